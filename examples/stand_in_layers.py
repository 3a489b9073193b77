"""The layers of the stand-in, from norm to decoder layer, and the seams at which a fault is planted.

A fault exchanges a class in :class:`Parts` for a subclass; nothing in this module knows about faults.

Shapes use b batch, s new positions, p cached positions, h hidden size, n query heads, g KV heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Settings:
    """What ``config.json`` says about the model, and the tensor-parallel degree."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope_theta: float
    rope_factor: float
    rope_positions: int
    rope_beta_fast: float
    rope_beta_slow: float
    rope_multiplier: float
    tp: int


@dataclass(frozen=True)
class AttentionOutput:
    """``hidden_states`` [b, s, h]; K and V [b, g, p + s, d]; ``cos_cache`` and ``sin_cache`` [b, s, d]."""

    hidden_states: Tensor
    present_key_value: tuple[Tensor, Tensor]
    cos_cache: Tensor
    sin_cache: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; statistics in FP32, the gain applied in the input's dtype."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (wide * inverse).to(hidden.dtype)


class RowParallel(nn.Module):
    """A linear map whose input axis is split over ``tp`` ranks; [..., in] to [..., out]."""

    def __init__(self, inputs: int, outputs: int, tp: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.tp = tp

    def partials(self, hidden: Tensor) -> list[Tensor]:
        """Return what each rank computes before the all-reduce: ``tp`` tensors [..., out]."""
        shards = zip(hidden.chunk(self.tp, -1), self.weight.chunk(self.tp, 1), strict=True)
        return [functional.linear(part, weight) for part, weight in shards]

    def forward(self, hidden: Tensor) -> Tensor:
        first, *others = self.partials(hidden)
        for other in others:
            first = first + other
        return first


class ColumnParallel(nn.Module):
    """A linear map whose output axis is split over ``tp`` ranks and gathered; [..., in] to [..., out]."""

    def __init__(self, inputs: int, outputs: int, tp: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.tp = tp

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([functional.linear(hidden, weight) for weight in self.weight.chunk(self.tp, 0)], -1)


class FusedQKV(nn.Module):
    """Q [b, s, n d], K and V [b, s, g d] before RoPE, from one product with the stacked weights."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        query, key = settings.query_heads * settings.head_dim, settings.kv_heads * settings.head_dim
        self.widths = [query, key, key]
        self.Wqkv = nn.Linear(settings.hidden_size, sum(self.widths), bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.Wqkv(hidden).split(self.widths, -1)
        return query, key, value


class Rotary(nn.Module):
    """cos and sin of the YaRN rotary embedding, each [b, s, d] for ``position_ids`` [b, s].

    YaRN (Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4): dimensions that turn more than
    ``beta_fast`` times over the original context keep their frequency, those that turn less than ``beta_slow``
    times are slowed by ``factor``, a ramp joins them, and cos and sin are multiplied by ``0.1 ln(factor) + 1``.
    """

    frequencies: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        half, base = settings.head_dim // 2, settings.rope_theta

        def pair_turning(times: float) -> float:
            period = settings.rope_positions / (times * 2 * math.pi)
            return half * math.log(period) / math.log(base)

        low = max(math.floor(pair_turning(settings.rope_beta_fast)), 0)
        high = min(math.ceil(pair_turning(settings.rope_beta_slow)), settings.head_dim - 1)
        pairs = torch.arange(half, dtype=torch.float32)
        slowed = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        plain = 1.0 / base ** (pairs / half)
        self.register_buffer(
            "frequencies", plain * (1 - slowed) + plain / settings.rope_factor * slowed, persistent=False
        )
        self.multiplier = settings.rope_multiplier

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.multiplier).to(dtype), (angles.sin() * self.multiplier).to(dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE over a growing KV cache."""

    def __init__(self, settings: Settings, index: int, parts: Parts) -> None:
        super().__init__()
        self.settings = settings
        self.scale = settings.head_dim**-0.5
        self.qkv_proj = parts.qkv(settings)
        self.rotary_emb = parts.rotary(settings) if index == 0 else None
        self.o_proj = RowParallel(settings.query_heads * settings.head_dim, settings.hidden_size, settings.tp)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``heads`` [b, n, s, d] by the angles in ``cos`` and ``sin`` [b, s, d], halves paired."""
        left, right = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]

    def repeat(self, heads: Tensor) -> Tensor:
        """Give every query head its KV head: [b, g, p + s, d] to [b, n, p + s, d], neighbours sharing one."""
        return heads.repeat_interleave(self.settings.query_heads // self.settings.kv_heads, dim=1)

    def visible(self, mask: Tensor, new: int) -> Tensor:
        """Return which keys each query sees, [b, 1, s, p + s], from the mask of real positions [b, p + s]."""
        past = mask.shape[1] - new
        causal = torch.ones(new, mask.shape[1], dtype=torch.bool).tril(past)
        return causal & mask[:, None, None, :]

    def extend(self, past: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cache after this call: ``past`` [b, g, p, d], then the new K and V [b, g, s, d]."""
        return torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return the attention over ``key`` and ``value`` [b, g, p + s, d] for ``query`` [b, n, s, d]."""
        scores = query.float() @ self.repeat(key).float().transpose(2, 3) * self.scale
        hidden = ~self.visible(mask, query.shape[2])
        weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
        mixed: Tensor = weights.to(value.dtype) @ self.repeat(value)
        return mixed

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor] | None,
    ) -> AttentionOutput:
        batch, new, _ = hidden.shape
        query, key, value = (
            flat.view(batch, new, -1, self.settings.head_dim).transpose(1, 2) for flat in self.qkv_proj(hidden)
        )
        if self.rotary_emb is not None:
            angles = self.rotary_emb(position_ids, hidden.dtype)
        if angles is None:
            raise ValueError("only layer 0 computes cos and sin; later layers need them as `angles`")
        cos, sin = angles
        query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        present = self.extend(past, key, value)
        mixed = self.attend(query, *present, mask).transpose(1, 2).flatten(2)
        return AttentionOutput(self.o_proj(mixed), present, cos, sin)


class MLP(nn.Module):
    """The gated feed-forward block; returns a tuple of one tensor [b, s, h]."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        super().__init__()
        wide, tp = settings.intermediate_size, settings.tp
        self.gate_proj = ColumnParallel(settings.hidden_size, wide, tp)
        self.up_proj = ColumnParallel(settings.hidden_size, wide, tp)
        self.act_fn = parts.activation()
        self.down_proj = RowParallel(wide, settings.hidden_size, tp)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)),)


class Layer(nn.Module):
    """One decoder layer; returns (hidden [b, s, h], (K, V), cos, sin, residual), the last always None."""

    def __init__(self, settings: Settings, index: int, parts: Parts) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = parts.norm(settings.hidden_size, settings.norm_epsilon)
        self.self_attn = parts.attention(settings, index, parts)
        self.post_attention_layernorm = parts.norm(settings.hidden_size, settings.norm_epsilon)
        self.mlp = parts.mlp(settings, parts)

    def residual(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output to the stream, both [b, s, h]."""
        return hidden + attended

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, None]:
        normed = self.input_layernorm(hidden)
        attention = self.self_attn(normed, position_ids, mask, past, angles)
        hidden = self.residual(hidden, attention.hidden_states)
        (update,) = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + update, attention.present_key_value, attention.cos_cache, attention.sin_cache, None


def last_real(mask: Tensor) -> Tensor:
    """Return the index of each row's last real position, [b], from the mask of new positions [b, s]."""
    return (mask * torch.arange(mask.shape[1])).argmax(-1)


@dataclass(frozen=True)
class Parts:
    """The classes that the model is assembled from; a fault exchanges one of them for a subclass."""

    embedding: type[nn.Embedding] = nn.Embedding
    norm: type[RMSNorm] = RMSNorm
    qkv: type[FusedQKV] = FusedQKV
    rotary: type[Rotary] = Rotary
    attention: type[Attention] = Attention
    activation: type[nn.Module] = nn.SiLU
    mlp: type[MLP] = MLP
    layer: type[Layer] = Layer
    last_real: Callable[[Tensor], Tensor] = last_real
