"""Several compile passes of one capture, recorded as one run.

A compiled graph carries a limited number of captured tensors, so that a capture of everything takes several
compilations. Each is run on the same tokens and adds its sites to the run. They are different programs: whether their
logits agree is kept with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ...store.manifest import PromptTokens
from ...store.progress import Progress, no_progress
from ..drive import observer_effect, run_prompts
from ..generate import Generation
from ..prompts import EncodedPrompt
from ..recorder import TensorSink
from .adapter import NxdiCausalModel
from .captured import MANUAL, CapturedTensorHook, DimsOf
from .device_plan import DevicePass

#: Opens a compile pass: an application that calls the hook, behind the adapter, while the context lasts.
Opened = Callable[[CapturedTensorHook], AbstractContextManager[NxdiCausalModel]]


def record_passes(
    passes: Iterable[tuple[DevicePass, Opened]],
    prompts: Sequence[EncodedPrompt],
    generation: Generation,
    writer: TensorSink,
    dims_of: DimsOf,
    *,
    tokens: list[PromptTokens],
    rank: int = 0,
    positions: range | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Run every pass over the same tokens; each site is stored once, by the first pass that has it.

    Args:
        passes: what each captures, and how it is opened; one is open at a time.
        prompts: what they run on. Later passes are fed what the first one chose.
        generation: how prompts are continued.
        writer: where tensors go.
        dims_of: their dims.
        tokens: receives the tokens of every prompt, from the first pass.
        rank: which rank's part the tensors are.
        positions: keep only these token positions.
        progress: told about batches.

    Returns:
        Facts for the run's provenance: `skipped`, and `passes`: per pass its modules, and whether the logits of its
        first prefill are those of the first pass.
    """
    stored: set[tuple[str, str]] = set()
    skipped: dict[str, str] = {}
    facts: list[dict[str, Any]] = []
    first: torch.Tensor | None = None
    n_slots = 0
    for number, (part, opened) in enumerate(passes):
        hook = CapturedTensorHook(
            part.slots(), writer, dims_of, rank=rank, positions=positions, first_order=n_slots, stored=frozenset(stored)
        )
        fed = prompts if number == 0 else _forced(prompts, tokens)
        chosen = tokens if number == 0 else []
        with opened(hook) as drive:
            logits = run_prompts(drive, fed, generation, drive.step, tokens=chosen, progress=progress)
        first = logits if first is None else first
        facts.append({"modules": list(part.modules), "inputs": part.inputs, "logits": observer_effect(first, logits)})
        skipped |= hook.skipped
        stored |= {*part.slots(), (MANUAL, "output")}
        n_slots += len(part.slots())
    return {"skipped": skipped, "passes": facts}


def _forced(prompts: Sequence[EncodedPrompt], tokens: Sequence[PromptTokens]) -> list[EncodedPrompt]:
    """The prompts with the tokens that were chosen after them."""
    return [
        replace(prompt, forced=chosen.token_ids[len(prompt.token_ids) :])
        for prompt, chosen in zip(prompts, tokens, strict=True)
    ]
