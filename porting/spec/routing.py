"""Ways to route tokens to experts, as functions from scores to weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from .architecture import Number, Router
from .expressions import Expressions

_SCALES = ("routed_scaling_factor",)
_GROUPS = ("n_group", "topk_group")


def candidates(
    plain: Router,
    logits: torch.Tensor,
    corrections: Mapping[tuple[str, str], torch.Tensor],
    numbers: Expressions,
) -> Iterator[tuple[Router, torch.Tensor]]:
    """Every known way to route, with the weights that it gives, (token, expert), 0 for experts that are not chosen.

    Ways that cannot differ on these values (a scale of 1, one group) are left out, so that at most one fits.

    Args:
        plain: the router without its way: names and sizes.
        logits: (token, expert).
        corrections: tensors that may be added for choosing, by module (empty for the router) and name; an empty name
            for none.
        numbers: expressions over the configuration.
    """
    small = numbers.small
    top_k = int(small.num_experts_per_tok)
    scales: list[Number | None] = [None]
    scales += [numbers.number(f"config.{key}") for key in _SCALES if getattr(small, key, 1.0) != 1.0]
    for scale, ((module, name), correction) in itertools.product(scales, corrections.items()):
        factor = 1.0 if scale is None else float(numbers.value(scale.expression, small))
        for router, weights in _choices(plain, logits, correction, top_k, numbers):
            if name == "" or correction.abs().max() > 0:
                yield replace(router, scale=scale, correction=name, correction_module=module), factor * weights


def _choices(
    plain: Router, logits: torch.Tensor, correction: torch.Tensor, top_k: int, numbers: Expressions
) -> Iterator[tuple[Router, torch.Tensor]]:
    chosen = (logits + correction).topk(top_k, -1).indices
    inside = torch.zeros_like(logits).scatter(1, chosen, torch.softmax(logits.gather(1, chosen), -1))
    if not correction.any():
        yield replace(plain, scores="softmax", after_top_k=True), inside
        jitter = getattr(numbers.small, "router_jitter_noise", None)
        if jitter and top_k == 2:
            number = numbers.number("config.router_jitter_noise")
            yield replace(plain, scores="sparsemixer", jitter=number), sparsemixer(logits, float(jitter))
    groups, opened = (getattr(numbers.small, key, None) or 1 for key in _GROUPS)
    for kind, scores in (("softmax", torch.softmax(logits, -1)), ("sigmoid", torch.sigmoid(logits))):
        for group_score in ("", "max", "top2") if groups > 1 else ("",):
            ranked = scores + correction
            if group_score:
                ranked = ranked.masked_fill(~open_experts(ranked, groups, opened, group_score), 0.0)
            index = ranked.topk(top_k, -1).indices
            weights = torch.zeros_like(scores).scatter(1, index, scores.gather(1, index))
            router = replace(plain, scores=kind, group_score=group_score)
            if group_score:
                n_groups, n_open = (numbers.number(f"config.{key}") for key in _GROUPS)
                router = replace(router, groups=n_groups, open_groups=n_open)
            yield router, weights
            if kind == "sigmoid" or not _equal(weights, inside):
                yield replace(router, normalized=True), weights / weights.sum(-1, keepdim=True)
            # a softmax over all, normalised over the chosen, is the softmax over the chosen: one name is enough


def _equal(weights: torch.Tensor, inside: torch.Tensor) -> bool:
    return bool(torch.allclose(weights / weights.sum(-1, keepdim=True), inside, atol=1e-6))


def open_experts(ranked: torch.Tensor, groups: int, opened: int, group_score: str) -> torch.Tensor:
    """Which experts are in one of the best groups: (token, expert)."""
    by_group = ranked.reshape(*ranked.shape[:-1], groups, -1)
    best = by_group.amax(-1) if group_score == "max" else by_group.topk(2, -1).values.sum(-1)
    mask = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(opened, -1).indices, True)
    return mask.unsqueeze(-1).expand_as(by_group).flatten(1)


def sparsemixer(logits: torch.Tensor, jitter: float) -> torch.Tensor:
    """Weights of the two best experts, each a softmax over what is within 2 jitter of it (Liu et al., 2024)."""
    weights = torch.zeros_like(logits)
    left = logits
    for _ in range(2):
        best, index = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        near = torch.softmax(left.masked_fill(far, float("-inf")), -1)
        weights = weights.scatter(1, index, near.gather(1, index))
        left = left.scatter(1, index, float("-inf"))
    return weights
