"""Runs made of numpy arrays: what a model would have recorded, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorsleuth.store import Prompt, PromptTokens, RunManifest, RunWriter, TensorKey, Trace

Array = npt.NDArray[Any]


@dataclass
class Values:
    """An array as the writer takes it."""

    array: Array
    memo: Any = None

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @contextmanager
    def values(self) -> Iterator[Array]:
        yield np.ascontiguousarray(self.array)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a site: `[1, positions, features]` from position `start` on, or whole without positions."""

    module: str
    array: Array
    start: int | None = 0
    phase: str = "prefill"
    step: int = 0
    prompt: int = 0
    order: int = 0
    slot: str = ""
    dims: str = "b s h"


def add_run(
    trace: Trace,
    run: str,
    tensors: Sequence[Tensor],
    *,
    role: str = "target",
    tokens: dict[int, Sequence[int]] | None = None,
    n_prompt: int | None = None,
    provenance: dict[str, Any] | None = None,
    status: str = "complete",
) -> None:
    """Record a run of numpy arrays; `tokens` are given per prompt, `n_prompt` is the prompts' length."""
    listing = {prompt: tuple(ids) for prompt, ids in (tokens or {}).items()}
    prompts = tuple(Prompt(p, str(p), None, n_prompt or len(ids)) for p, ids in listing.items())
    manifest = trace.begin_run(
        RunManifest(
            0, run, role, "import", "numpy", "float32", "cpu", 1, "running", "2026-01-02T03:04:05+00:00",
            provenance or {}, prompts, tuple(PromptTokens(p, ids) for p, ids in listing.items()),
        )
    )  # fmt: skip
    with RunWriter(trace.run_folder(run), run, manifest=manifest.to_json) as writer:
        for tensor in tensors:
            count = None if tensor.start is None else tensor.array.shape[1]
            key = TensorKey(
                tensor.prompt, tensor.phase, tensor.step, 0, tensor.order, tensor.module, "output", tensor.slot,
                tensor.dims if tensor.start is not None else "", tensor.start, count,
            )  # fmt: skip
            writer.put(key, Values(tensor.array))
    trace.finish_run(replace(manifest, status=status))
