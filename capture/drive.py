"""Running a causal model over prompts, batch by batch, and checking that capturing does not change it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..store.manifest import PromptTokens
from ..store.progress import Progress, no_progress
from .generate import CausalModel, Generation, StepContext, run_batch
from .prompts import EncodedPrompt


def bare_prefill(adapter: CausalModel, prompts: Sequence[EncodedPrompt], generation: Generation) -> torch.Tensor:
    """Logits of the first batch's prefill; nothing is recorded."""
    first, batch = next(iter(generation.batches(prompts)))
    seen: list[torch.Tensor] = []
    run_batch(
        adapter,
        [replace(prompt, forced=()) for prompt in batch],
        first,
        generation,
        lambda _: nullcontext(),
        on_logits=lambda _, logits: seen.append(logits.clone()),
    )
    return seen[0]


def run_prompts(
    adapter: CausalModel,
    prompts: Sequence[EncodedPrompt],
    generation: Generation,
    step: StepContext,
    *,
    tokens: list[PromptTokens],
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Prefill and decode all prompts.

    Args:
        adapter: the model.
        prompts: what it runs on.
        generation: how prompts are continued.
        step: context around every forward pass.
        tokens: receives the tokens of every prompt as soon as its batch is done.
        progress: called before every batch.

    Returns:
        Logits of the first batch's prefill.
    """
    batches = list(generation.batches(prompts))
    seen: list[torch.Tensor] = []

    def keep_first(number: int, logits: torch.Tensor) -> None:
        if number == 0 and not seen:
            seen.append(logits.clone())

    for number, (first, batch) in enumerate(batches):
        progress("capture", number, len(batches))
        continuations = run_batch(adapter, batch, first, generation, step, on_logits=keep_first)
        tokens.extend(
            PromptTokens(
                first + row,
                (*prompt.token_ids, *continuation),
                len(prompt.token_ids) if prompt.forced is not None else None,
            )
            for row, (prompt, continuation) in enumerate(zip(batch, continuations, strict=True))
        )
    return seen[0]


def observer_effect(bare: torch.Tensor, captured: torch.Tensor) -> dict[str, Any]:
    """Whether logits with and without capture are bit-identical, and their largest difference."""
    same = bare.shape == captured.shape and torch.equal(
        bare.contiguous().view(torch.uint8), captured.contiguous().view(torch.uint8)
    )
    difference = float((bare.double() - captured.double()).abs().max()) if bare.shape == captured.shape else None
    return {"checked": True, "identical": same, "max_abs_difference": difference}
