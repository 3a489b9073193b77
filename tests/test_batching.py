"""Runs of one model in other batches agree: what follows the batch is left out, with a reason, and nothing fails."""

from __future__ import annotations

import pytest
from tensorsleuth.analyze.batching import REASON
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.store import Trace

pytest.importorskip("torch", reason="needs torch and transformers: pip install 'tensorsleuth[capture]'")

from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.capture.selection import Selection
from tensorsleuth.examples.walkthrough import MODEL

PROMPTS = tuple(PromptInput(str(n), token_ids=tuple(range(97, 101 + 2 * n))) for n in range(4))
OTHERWISE = {
    "one-by-one": Generation(batch_size=1),
    "padded-right": Generation(batch_size=2, padding="right"),
    "in-threes": Generation(batch_size=3),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Reference and baseline in pairs, and the baseline's model in other batches, once as many of them."""
    trace = Trace.create(tmp_path_factory.mktemp("batching") / "trace")
    source, selection = ModelSource(MODEL, attention="eager"), Selection(("*layers.0*",), inputs=True)
    first = Generation(new_tokens=3, batch_size=2)
    capture_hugging_face(
        trace, HuggingFaceCapture(source, "fp32", "reference", prompts=PROMPTS, generation=first, selection=selection)
    )
    alike = Generation(batch_size=2)
    for run, generation in {"bf16": alike, "again": alike, **OTHERWISE}.items():
        role = "baseline" if run == "bf16" else "target"
        capture_hugging_face(
            trace,
            HuggingFaceCapture(
                source, run, role, "bfloat16", teacher="fp32", generation=generation, selection=selection
            ),
        )
    return trace


def skipped(trace: Trace, comparison: str) -> set[str]:
    """Sites that follow the batch."""
    found = "SELECT site FROM coverage WHERE comparison = ? AND status = 'skipped' AND reason = ?"
    return {row["site"] for row in trace.query(found, [comparison, REASON]).to_pylist()}


@pytest.mark.parametrize("run", OTHERWISE)
def test_other_batches_are_no_fault(trace: Trace, run: str) -> None:
    assert compare(trace, ComparisonRequest("fp32", run, "bf16")).verdict == "pass"
    inputs = {f"model.layers.0{part}:input" for part in ("", ".self_attn")}
    assert skipped(trace, run) == {
        f"{site}[{slot}]" for site in inputs for slot in ("attention_mask", "cache_position")
    }
    weights = "SELECT DISTINCT phase, verdict FROM measurements WHERE comparison = ? AND site = ? AND prompt IS NULL"
    compared = trace.query(weights, [run, "model.layers.0.self_attn[1]"]).to_pylist()
    assert sorted((row["phase"], row["verdict"]) for row in compared) == [("decode", "pass"), ("prefill", "pass")]


def test_a_baseline_in_other_batches_is_no_yardstick_for_masks(trace: Trace) -> None:
    compare(trace, ComparisonRequest("fp32", "bf16", "one-by-one", name="other-baseline"))
    assert "model.layers.0:input[attention_mask]" in skipped(trace, "other-baseline")


def test_in_the_same_batches_masks_are_compared(trace: Trace) -> None:
    assert compare(trace, ComparisonRequest("fp32", "again", "bf16")).verdict == "pass"
    assert skipped(trace, "again") == set()
