"""Answering a prompt: prefill, then one token after the other, greedy or sampled, with the time that each took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...capture.generate import CausalModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        new_tokens: tokens at most.
        temperature: 0 for greedy, else the divisor of the logits.
        top_p: sample from the smallest set of tokens of this probability.
        seed: of the random numbers.
        stop: tokens that end the answer.
        suppressed: tokens that are never chosen.
    """

    new_tokens: int = 50
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()
    suppressed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        tokens: tokens after the prompt, a stop token included.
        stopped: a stop token ended it.
        first_seconds: from the call to the first token (prefill).
        seconds: of all.
        n_suppressed: how often a suppressed token was the likeliest.
        n_nonfinite: forward passes whose logits held NaN or infinity.
    """

    tokens: tuple[int, ...]
    stopped: bool
    first_seconds: float
    seconds: float
    n_suppressed: int
    n_nonfinite: int
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "tokens": list(self.tokens)}


def answer(model: CausalModel, prompt: Sequence[int], sampling: Sampling) -> Answer:
    """Let a model continue a prompt.

    Args:
        model: the model, with a cache of its own.
        prompt: token ids.
        sampling: how tokens are chosen.
    """
    random = torch.Generator().manual_seed(sampling.seed)
    tokens: list[int] = []
    ids = torch.tensor([list(prompt)])
    positions = torch.arange(len(prompt))[None]
    cache: Any = None
    n_suppressed = n_nonfinite = 0
    started = time.perf_counter()
    first = 0.0
    with torch.no_grad():
        while True:
            mask = torch.ones((1, len(prompt) + len(tokens)), dtype=torch.int64)
            logits, cache = model(ids, mask, positions, cache)
            last = logits[0, -1 if logits.shape[1] == 1 else ids.shape[1] - 1].float()
            n_nonfinite += int(not torch.isfinite(last).all())
            n_suppressed += int(int(last.argmax()) in sampling.suppressed)
            tokens.append(_choose(last, sampling, random))
            first = first or time.perf_counter() - started
            if tokens[-1] in sampling.stop or len(tokens) >= sampling.new_tokens:
                break
            ids = torch.tensor([[tokens[-1]]])
            positions = torch.tensor([[len(prompt) + len(tokens) - 1]])
    seconds = time.perf_counter() - started
    return Answer(tuple(tokens), tokens[-1] in sampling.stop, first, seconds, n_suppressed, n_nonfinite)


def _choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    logits = logits.clone()
    if sampling.suppressed:
        logits[[token for token in sampling.suppressed if token < len(logits)]] = -torch.inf
    if sampling.temperature <= 0.0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(-1)
    sorted_ones, order = probabilities.sort(descending=True)
    outside = sorted_ones.cumsum(-1) - sorted_ones >= sampling.top_p
    sorted_ones[outside] = 0.0
    return int(order[torch.multinomial(sorted_ones / sorted_ones.sum(), 1, generator=random)])
