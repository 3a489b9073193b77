"""Running a causal language model over prompts: prefill, then decode steps through its key-value cache.

Greedy or teacher-forced, in batches with left or right padding, and recorded with the layout of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from ..store.manifest import ENCODE
from .layout import StepLayout, layout_from_mask
from .prompts import EncodedPrompt


class CausalModel(Protocol):
    """One forward pass of a causal language model."""

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Compute logits.

        Args:
            input_ids: `[batch, length]` int64.
            attention_mask: `[batch, past + length]` int64, 1 at real tokens; None when all are.
            position_ids: `[batch, length]` int64.
            cache: what the previous call returned; at prefill None, or the `Source` of an encoder-decoder.

        Returns:
            Logits `[batch, length or 1, vocabulary]` (one position means the last real one) and the new cache.
        """


@dataclass(frozen=True)
class Source:
    """What the encoder reads for a batch, padded on the right: token ids and mask, both `[batch, length]` int64."""

    ids: torch.Tensor
    mask: torch.Tensor


Padding = Literal["left", "right"]
StepContext = Callable[[StepLayout], AbstractContextManager[None]]


@dataclass(frozen=True)
class Generation:
    """How prompts are continued.

    Attributes:
        new_tokens: greedy tokens per prompt; prompts with forced tokens follow those instead.
        stop_tokens: token ids that end a greedy continuation.
        padding: side of the padding in batches.
        pad_token: token id at padding.
        batch_size: prompts per batch.
    """

    new_tokens: int = 1
    stop_tokens: frozenset[int] = frozenset()
    padding: Padding = "left"
    pad_token: int = 0
    batch_size: int = 1

    def batches(self, prompts: Sequence[EncodedPrompt]) -> Iterator[tuple[int, Sequence[EncodedPrompt]]]:
        """Batches of prompts with the index of their first prompt."""
        for start in range(0, len(prompts), self.batch_size):
            yield start, prompts[start : start + self.batch_size]


def padded(batch: Sequence[EncodedPrompt], generation: Generation) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[batch, longest]` int64."""
    longest = max(len(prompt.token_ids) for prompt in batch)
    ids = torch.full((len(batch), longest), generation.pad_token, dtype=torch.int64)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, prompt in enumerate(batch):
        n = len(prompt.token_ids)
        where = slice(longest - n, longest) if generation.padding == "left" else slice(0, n)
        ids[row, where] = torch.tensor(prompt.token_ids)
        mask[row, where] = 1
    return ids, mask


def source_of(batch: Sequence[EncodedPrompt], avoid: int) -> Source | None:
    """What the encoder reads for a batch, None for models without encoder.

    Args:
        batch: the prompts.
        avoid: number of tokens per row of the decoder. The source has another one, so that the length of a tensor's
            token axis says whose tokens it holds.
    """
    sources = [prompt.source_ids for prompt in batch if prompt.source_ids is not None]
    if not sources:
        return None
    longest = max(max(map(len, sources)), 2)
    longest += longest == avoid
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = torch.tensor(source)
        mask[row, : len(source)] = 1
    return Source(ids, mask)


def positions_of(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Position ids of the last `length` columns of a mask; padding gets position 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]


def run_batch(
    model: CausalModel,
    batch: Sequence[EncodedPrompt],
    first_prompt: int,
    generation: Generation,
    step: StepContext,
    *,
    on_logits: Callable[[int, torch.Tensor], None] = lambda _step, _logits: None,
) -> list[tuple[int, ...]]:
    """Prefill one batch and decode until every row is done.

    Args:
        model: the model.
        batch: its prompts.
        first_prompt: index of the first prompt within the run.
        generation: see `Generation`.
        step: context around every forward pass; receives its layout.
        on_logits: called with the step and the logits of every forward pass.

    Returns:
        For every prompt, the tokens after it: forced or greedy. The last one is not fed to the model.
    """
    prompts = range(first_prompt, first_prompt + len(batch))
    ids, mask = padded(batch, generation)
    continuation: list[list[int]] = [[] for _ in batch]
    source = source_of(batch, ids.shape[1])
    cache: Any = source
    number = 0
    while True:
        length = ids.shape[1]
        phase = "prefill" if number == 0 else "decode"
        layout = layout_from_mask(mask, length, phase=phase, step=number, prompts=prompts)
        if source is not None and number == 0:
            reading = layout_from_mask(source.mask, source.mask.shape[1], phase=ENCODE, step=0, prompts=prompts)
            layout = replace(layout, source=reading)
        with step(layout):
            logits, cache = model(ids, mask, positions_of(mask, length), cache)
        on_logits(number, logits)
        for row in layout.rows:
            last = 0 if logits.shape[1] == 1 else row.start + row.count - 1
            continuation[row.index].append(
                _next_token(batch[row.index], continuation[row.index], logits[row.index, last])
            )
        alive = [_continues(prompt, done, generation) for prompt, done in zip(batch, continuation, strict=True)]
        if not any(alive):
            return [tuple(tokens) for tokens in continuation]
        ids = torch.tensor(
            [[done[-1] if go else generation.pad_token] for done, go in zip(continuation, alive, strict=True)]
        )
        mask = torch.cat([mask, torch.tensor(alive, dtype=mask.dtype)[:, None]], dim=1)
        number += 1


def _next_token(prompt: EncodedPrompt, done: list[int], logits: torch.Tensor) -> int:
    if prompt.forced is not None and len(done) < len(prompt.forced):
        return prompt.forced[len(done)]
    return int(logits.argmax())


def _continues(prompt: EncodedPrompt, done: list[int], generation: Generation) -> bool:
    if prompt.forced is not None:
        return len(done) < len(prompt.forced)
    return len(done) < generation.new_tokens and done[-1] not in generation.stop_tokens
