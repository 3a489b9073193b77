"""The whole pipeline on the shipped model: three captures into one trace, then a comparison.

The target is the stand-in of :mod:`.stand_in`, NOT a Neuron run: it shows what a port's trace looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..analyze.compare import ComparisonRequest, ComparisonSummary, compare
from ..capture.generate import Generation
from ..capture.hf import ModelSource, checkpoint_fingerprint
from ..capture.hf_run import HuggingFaceCapture, capture_hugging_face, run_recorded
from ..capture.prompts import read_prompts, teacher_prompts
from ..capture.selection import Selection
from ..store.errors import InputError
from ..store.progress import Progress, no_progress
from ..store.trace import Trace
from .faults import FAULTS
from .stand_in import StandIn, load

MODEL = Path(__file__).parent / "tiny-llama"
REFERENCE, BASELINE, TARGET = "fp32", "bf16", "target"
#: Greedy tokens of the reference per prompt: one from prefill, the others from decode steps.
NEW_TOKENS = 16


@dataclass(frozen=True)
class StandInModel:
    """Adapts the stand-in to `capture.generate.CausalModel`."""

    model: StandIn

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """See `capture.generate.CausalModel`."""
        mask = None if attention_mask is None else attention_mask.bool()
        output = self.model(input_ids, position_ids, mask, cache)
        return output.logits, output.cache


def capture_references(trace: Trace, *, new_tokens: int = NEW_TOKENS, progress: Progress = no_progress) -> None:
    """Record the FP32 reference, which writes the continuation, and the BF16 baseline, which follows it."""
    source = ModelSource(MODEL)
    generation = Generation(new_tokens=new_tokens)
    capture_hugging_face(
        trace,
        HuggingFaceCapture(
            source, REFERENCE, "reference", "float32", read_prompts(MODEL / "prompts.jsonl"), generation=generation
        ),
        progress=progress,
    )
    capture_hugging_face(
        trace, HuggingFaceCapture(source, BASELINE, "baseline", "bfloat16", teacher=REFERENCE), progress=progress
    )


def capture_target(
    trace: Trace,
    *,
    fault: str | None = None,
    run: str = TARGET,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = no_progress,
) -> None:
    """Record the stand-in, with or without a planted bug, on the reference's tokens.

    Raises:
        InputError: there is no such fault.
    """
    if fault is not None and fault not in FAULTS:
        raise InputError(f"there is no fault {fault!r}; choose one of {', '.join(FAULTS)}")
    model = load(MODEL, dtype, fault=fault)
    facts = {
        "note": "a stand-in written in plain PyTorch, not a Neuron run",
        "fault": fault,
        "checkpoint_fingerprint": checkpoint_fingerprint(ModelSource(MODEL)),
        "teacher": REFERENCE,
    }
    run_recorded(
        trace,
        model,
        StandInModel(model),
        teacher_prompts(trace.manifest(REFERENCE)),
        Generation(),
        run=run,
        role="target",
        stack="torch",
        model_name=f"{MODEL.name} (stand-in)",
        selection=Selection(),
        facts=facts,
        progress=progress,
    )


def compare_target(trace: Trace, *, run: str = TARGET, progress: Progress = no_progress) -> ComparisonSummary:
    """Compare the target with the reference and the baseline."""
    return compare(trace, ComparisonRequest(REFERENCE, run, BASELINE), progress=progress)
