"""Layers of the stand-in with one bug each, which :mod:`.faults` puts in the place of the correct ones.

Shapes are those of the classes they derive from, in :mod:`.stand_in_layers`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .stand_in_layers import (
    MLP,
    Attention,
    FusedQKV,
    Layer,
    Parts,
    RMSNorm,
    Rotary,
    RowParallel,
    Settings,
    last_real,
)


class ScaledEmbedding(nn.Embedding):
    """Multiplies by the square root of the hidden size, as Gemma does and Llama does not."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class OffsetNorm(RMSNorm):
    """Applies the gain as 1 + w, as Gemma does."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (1 + self.weight) * (wide * inverse).to(hidden.dtype)


class HalfPrecisionNorm(RMSNorm):
    """Keeps the variance and its reciprocal root in the model's dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        inverse = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (hidden * inverse)


class ValueBeforeKey(FusedQKV):
    """Splits the fused product as Q, V, K."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, value, key = self.Wqkv(hidden).split(self.widths, -1)
        return query, key, value


class LateDecode(Rotary):
    """Rotates every decoded token by one position too many."""

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return super().forward(position_ids + int(position_ids.shape[1] == 1), dtype)


class DoublyScaled(Attention):
    """Divides the scores by the square root of the head size twice."""

    def __init__(self, settings: Settings, index: int, parts: Parts) -> None:
        super().__init__(settings, index, parts)
        self.scale = self.scale**2


class Interleaved(Attention):
    """Pairs neighbouring dimensions in RoPE, though the weights pair the two halves of a head."""

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
        return heads * cos[:, None] + turned * sin[:, None]


class TiledHeads(Attention):
    """Repeats the KV heads in rounds (0 1 2 3 0 1 2 3) instead of side by side (0 0 1 1 2 2 3 3)."""

    def repeat(self, heads: Tensor) -> Tensor:
        return heads.repeat(1, self.settings.query_heads // self.settings.kv_heads, 1, 1)


class SeesNext(Attention):
    """Lets every query of prefill see one key too far."""

    def visible(self, mask: Tensor, new: int) -> Tensor:
        past = mask.shape[1] - new
        causal = torch.ones(new, mask.shape[1], dtype=torch.bool).tril(past + 1)
        return causal & mask[:, None, None, :]


class ForgetsFirst(Attention):
    """Masks the first cached position during decode."""

    def visible(self, mask: Tensor, new: int) -> Tensor:
        keys = super().visible(mask, new).clone()
        if mask.shape[1] > new:
            keys[..., 0] = False
        return keys


class UnwrittenKey(Attention):
    """Leaves the cache's key slot of a decoded token as it was allocated, zero."""

    def extend(self, past: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return super().extend(past, key * int(past[0].shape[2] == 0), value)


class FirstRankOnly(RowParallel):
    """Forgets the all-reduce: returns the partial product of rank 0."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.partials(hidden)[0]


class UnreducedMLP(MLP):
    """Has a ``down_proj`` without its all-reduce."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        super().__init__(settings, parts)
        self.down_proj = FirstRankOnly(settings.intermediate_size, settings.hidden_size, settings.tp)


class ResidualLost(Layer):
    """Drops the residual connection around attention in layer 2."""

    def residual(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return attended if self.index == 2 else super().residual(hidden, attended)


def one_before_last(mask: Tensor) -> Tensor:
    """Return the position before each row's last real one, [b]."""
    return (last_real(mask) - 1).clamp(min=0)
