"""One torch thread, an empty trace and a reader of its tensors, tiny models of several architectures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from tensorsleuth.store import TensorKey, Trace
from tensorsleuth.store.run_writer import RunWriter
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

torch.set_num_threads(1)
settings.register_profile("tensorsleuth", deadline=None)
settings.load_profile("tensorsleuth")

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_DECODER),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen3": lambda: Qwen3Config(**_DECODER, head_dim=8),
    "mixtral": lambda: MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """An empty trace."""
    return Trace.create(tmp_path / "trace")


@dataclass(frozen=True)
class Stored:
    """One row of the `tensors` table with its values."""

    row: dict[str, Any]
    values: npt.NDArray[Any]


Read = Callable[..., list[Stored]]


@pytest.fixture(scope="session")
def read() -> Read:
    """Tensors of a trace with their values, in the order they were captured, filtered by an SQL condition."""

    def rows(trace: Trace, where: str = "true") -> list[Stored]:
        found = trace.query(
            "SELECT t.*, path FROM tensors t JOIN shards USING (run, shard) JOIN runs USING (run)"
            f" WHERE {where} ORDER BY ordinal, t.rank, seq"
        ).to_pylist()
        columns = ("path", "dtype", "shape", "file_offset", "nbytes")
        return [Stored(row, trace.values(*(row[column] for column in columns))) for row in found]

    return rows


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, by architecture: a config.json without weights."""
    parent = tmp_path_factory.mktemp("models")

    def folder(architecture: str) -> Path:
        path = parent / architecture
        if not path.exists():
            CONFIGS[architecture]().save_pretrained(path)
        return path

    return folder


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is not set, the writer thread stores nothing: what is handed over has to wait."""
    opened = threading.Event()
    pass_on = RunWriter._pass_on

    def wait_and_pass_on(self: RunWriter, key: TensorKey, source: Any) -> None:
        opened.wait(30)
        pass_on(self, key, source)

    monkeypatch.setattr(RunWriter, "_pass_on", wait_and_pass_on)
    yield opened
    opened.set()
