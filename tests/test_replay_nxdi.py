"""Replaying a port on NxD Inference: names, shards and padding are brought to the reference's modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.nxdi.run import NxdiCapture, capture_on_cpu
from tensorsleuth.capture.replay import ReplayRequest, replay
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import Trace
from test_nxdi_capture import LLAMA, PROMPTS, pytestmark, save_checkpoint
from transformers import LlamaConfig

__all__ = ["pytestmark"]
PLANTED = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Trace]:
    """A model, the same with one projection 5 % too large, and a trace with the former's reference and baseline."""
    parent = tmp_path_factory.mktemp("replay")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attention_bias=True,
    )
    model, broken = save_checkpoint(config, parent / "model"), parent / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    weights: dict[str, torch.Tensor] = load_file(model / "model.safetensors")
    weights[f"{PLANTED}.weight"] *= 1.05
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    trace, source = Trace.create(parent / "trace"), ModelSource(model)
    wanted = HuggingFaceCapture(source, "fp32", "reference", prompts=PROMPTS, generation=Generation(4))
    capture_hugging_face(trace, wanted)
    capture_hugging_face(trace, HuggingFaceCapture(source, "bf16", "baseline", "bfloat16", teacher="fp32"))
    return model, broken, trace


@pytest.mark.parametrize("tp", [1, 2])
def test_a_wrong_projection_of_a_port_is_the_only_module_that_injects(
    folders: tuple[Path, Path, Trace], tp: int
) -> None:
    _, broken, trace = folders
    run = f"tp{tp}"
    capture_on_cpu(
        trace,
        NxdiCapture(
            broken,
            LLAMA,
            run,
            "target",
            dtype="bfloat16",
            tp=tp,
            teacher="fp32",
            generation=Generation(batch_size=3),
            selection=Selection(inputs=True),
        ),
    )
    compare(trace, ComparisonRequest("fp32", run, "bf16"))
    summary = replay(trace, ReplayRequest(run))
    assert [found.module for found in summary.injecting] == [PLANTED]
    assert summary.inputs[PLANTED].text == "captured"
    around = [PLANTED, "model.layers.1.self_attn", "model.layers.1"]
    others = trace.query(
        """SELECT max(r_ratio) AS r FROM measurements
           WHERE comparison = ? AND prompt IS NULL AND NOT list_contains(?, module)""",
        [f"{run}.replay", around],
    ).to_pylist()
    assert others[0]["r"] < 1.2
    holes = {item.site: item.reason for item in summary.left_out if item.status == "unmatched"}
    assert holes == {}
