"""Two ways to take tensors from a model on a CPU: hooks of our own, or the library's tensor capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...store.manifest import Module
from ..recorder import Recorder, TensorSink
from ..selection import Selection
from .adapter import StepRecorder
from .captured import CapturedTensorHook, library_capture
from .device_plan import plan_device_capture
from .encoder_decoder import BothStacks, EncoderDecoderRecorder
from .job import RankJob
from .recorder import NxdiRecorder
from .site_dims import SiteDims

#: What drives a run: recorders that want layouts, and further arguments of the application's forward.
Taking = tuple[tuple[StepRecorder, ...], dict[str, Any]]


def distinct_models(application: Any) -> list[torch.nn.Module]:
    """The models of an application: with continuous batching, prefill and decode have one each; two stacks are one."""
    if not hasattr(application, "models"):
        return [BothStacks(application)]
    models: list[torch.nn.Module] = []
    for wrapper in application.models:
        if not any(wrapper.model is model for model in models):
            models.append(wrapper.model)
    return models


def modules_of(model: torch.nn.Module) -> tuple[Module, ...]:
    """The module tree of a model, without an execution order."""
    return Recorder(model, None, Selection()).modules()


@contextmanager
def take_from_hooks(
    job: RankJob, rank: int, models: Sequence[torch.nn.Module], writer: TensorSink, facts: dict[str, Any]
) -> Iterator[Taking]:
    """Record with hooks on every module, and taps; the facts tell what was skipped."""
    kind = EncoderDecoderRecorder if isinstance(models[0], BothStacks) else NxdiRecorder
    recorders = tuple(
        kind(model, writer, job.selection, rank=rank, tp=job.tp, cache_length=job.length, scores=job.scores)
        for model in models
    )
    recorders[0].record_parameters()
    try:
        with ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.attached())
            yield recorders, {}
    finally:
        facts["skipped"] = {site: why for recorder in recorders for site, why in recorder.skipped.items()}
        facts["snapshots"] = sum(recorder.guard.n_snapshots for recorder in recorders)
        facts["modules"] = recorders[0].modules()


@contextmanager
def take_from_library(
    job: RankJob, rank: int, models: Sequence[torch.nn.Module], writer: TensorSink, facts: dict[str, Any]
) -> Iterator[Taking]:
    """Record what NxD Inference's own capture returns; on a CPU every rank has its part, on a device only rank 0."""
    kinds = {path: type(module).__name__ for path, module in models[0].named_modules()}
    plan = plan_device_capture(kinds, job.selection, budget=2 * len(kinds))
    (only,) = plan.passes
    hook = CapturedTensorHook(
        only.slots(), writer, SiteDims(models[0], job.tp), rank=rank, positions=job.selection.positions
    )
    facts["notes"] = list(plan.notes)
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(library_capture(model, only))
            yield (hook,), {"tensor_capture_hook": hook}
    finally:
        facts["skipped"] = dict(hook.skipped)
