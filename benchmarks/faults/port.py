"""A port of each architecture: its own attention, layer and expert code, with the seams at which bugs are planted.

`make_port` turns a transformers model into a port in place. A port computes what the model computes, in another order
of rounding: queries are scaled before the product with the keys, and the row-parallel projections are sums of two
partial products, each rounded, as an all-reduce over ranks makes them. Nothing here knows about faults; they replace
fields of `Attention` and `Layer` and the forwards of modules.

Shapes: b batch, s new positions, p all positions, n query heads, g KV heads, d head size, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Heads = Callable[[Tensor, int], Tensor]


def rotate_halves(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `[b, n, s, d]` with the two halves of a head paired; cos and sin are `[b, s, d]` or `[b, s, d / 2]`."""
    half = heads.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    left, right = heads[..., :half], heads[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def side_by_side(heads: Tensor, times: int) -> Tensor:
    """Give neighbouring query heads the same KV head: `[b, g, p, d]` to `[b, g * times, p, d]`."""
    return heads.repeat_interleave(times, dim=1)


@dataclass(frozen=True)
class Step:
    """One call of an attention core.

    Attributes:
        new: columns that it computes.
        past: columns before them, padding included.
        held: columns that keys and values are there for; the last ones, when the cache has a window.
    """

    new: int
    past: int
    held: int


class Attention:
    """Attention of any of the architectures; stands in for a module's forward.

    Attributes are the seams: a fault assigns them before the model runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.scale: float = module.scaling  # type: ignore[assignment]
        #: Multiply the scores instead of the queries.
        self.scale_scores = False
        self.softcap: float | None = getattr(module, "attn_logit_softcapping", None)
        self.sinks: Tensor | None = getattr(module, "sinks", None)
        self.rotate: Rotate = rotate_halves
        self.repeat: Heads = side_by_side
        self.mask: Callable[[Tensor, Step], Tensor] = lambda mask, step: mask
        self.queries: Callable[[Tensor], Tensor] = lambda heads: heads
        self.cache: Callable[[Tensor, Tensor, Step], tuple[Tensor, Tensor]] = lambda key, value, step: (key, value)
        self.mixed: Callable[[Tensor], Tensor] = lambda heads: heads
        #: Keep keys and values of all columns, also where the model's cache drops those outside a window.
        self.keep_all = False
        self._kept: tuple[Tensor, Tensor] | None = None
        #: dtype of the softmax; gpt-oss computes it in the model's own.
        self.softmax_dtype: torch.dtype | None = None if self.sinks is not None else torch.float32
        self.scores_dtype: torch.dtype | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """See the forward of transformers' attention modules."""
        module, shape = self.module, hidden_states.shape[:-1]
        heads = (*shape, -1, module.head_dim)
        query, key = module.q_proj(hidden_states).view(heads), module.k_proj(hidden_states).view(heads)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = self.rotate(query, *position_embeddings), self.rotate(key, *position_embeddings)
        past = 0 if cache_position is None else int(cache_position[0])
        if past_key_values is not None:
            own = self._keep(key, value, past)
            key, value = past_key_values.update(key, value, module.layer_idx, {"cache_position": cache_position})
            key, value = own or (key, value)
        step = Step(query.shape[2], past, key.shape[2])
        key, value = self.cache(key, value, step)
        mixed = self.mixed(self.attend(self.queries(query), key, value, attention_mask, step))
        return module.o_proj(mixed.transpose(1, 2).reshape(*shape, -1).contiguous()), None

    def _keep(self, key: Tensor, value: Tensor, past: int) -> tuple[Tensor, Tensor] | None:
        """All keys and values so far, when they are to be kept."""
        if not self.keep_all:
            return None
        if past > 0 and self._kept is not None:
            key, value = torch.cat([self._kept[0], key], 2), torch.cat([self._kept[1], value], 2)
        self._kept = key, value
        return self._kept

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, step: Step) -> Tensor:
        """Attention of `query` `[b, n, s, d]` over `key` and `value` `[b, g, p, d]`; `[b, n, s, d]`."""
        times = query.shape[1] // key.shape[1]
        key, value = self.repeat(key, times), self.repeat(value, times)
        if self.scores_dtype is not None:
            query, key = query.to(self.scores_dtype), key.to(self.scores_dtype)
        if self.scale_scores:
            scores = (query @ key.transpose(2, 3)) * self.scale
        else:
            scores = (query * self.scale) @ key.transpose(2, 3)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + self.mask(mask[..., : key.shape[2]], step).to(scores.dtype)
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
            scores = scores - scores.max(-1, keepdim=True).values
        # The lowest FP32 mask would be minus infinity in BF16, and a padding row of those has no softmax.
        weights = scores.clamp(min=-1e38).softmax(-1, dtype=self.softmax_dtype)
        if self.sinks is not None:
            weights = weights[..., :-1]
        return weights.to(value.dtype) @ value


class Layer:
    """A decoder layer of any of the architectures; stands in for a module's forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.is_gemma = hasattr(module, "pre_feedforward_layernorm")
        self.mlp = module.block_sparse_moe if hasattr(module, "block_sparse_moe") else module.mlp
        #: Joins the residual stream and what attention or the MLP adds to it.
        self.add_attention: Callable[[Tensor, Tensor], Tensor] = torch.add
        self.add_mlp: Callable[[Tensor, Tensor], Tensor] = torch.add

    def __call__(self, hidden_states: Tensor, **arguments: Any) -> Any:
        """See the forward of transformers' decoder layers."""
        layer = self.module
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
        if self.is_gemma:
            attended = layer.post_attention_layernorm(attended)
        hidden = self.add_attention(hidden_states, attended)
        norm = layer.pre_feedforward_layernorm if self.is_gemma else layer.post_attention_layernorm
        added = self.mlp(norm(hidden))
        added = added[0] if isinstance(added, tuple) else added
        if self.is_gemma:
            added = layer.post_feedforward_layernorm(added)
        output = self.add_mlp(hidden, added)
        return (output,) if self.is_gemma else output


def partial_products(module: nn.Linear, hidden: Tensor, ranks: int) -> list[Tensor]:
    """What each rank computes of a row-parallel projection, without bias: `ranks` tensors `[..., out]`."""
    shards = zip(hidden.chunk(ranks, -1), module.weight.chunk(ranks, 1), strict=True)
    return [functional.linear(part, weight) for part, weight in shards]


def row_parallel(module: nn.Linear, ranks: int, reduce: str = "wide") -> Callable[[Tensor], Tensor]:
    """A forward that sums the partial products of `ranks` ranks, each rounded to the model's dtype.

    Args:
        module: the projection.
        ranks: how many parts.
        reduce: `wide` adds the parts in FP32 and rounds once; `narrow` rounds every addition.
    """

    def forward(hidden: Tensor) -> Tensor:
        first, *others = partial_products(module, hidden, ranks)
        total = first.float() if reduce == "wide" else first
        for other in others:
            total = total + other
        total = total.to(hidden.dtype)
        return total if module.bias is None else total + module.bias

    return forward


def attentions(model: Any) -> list[Attention]:
    """The ported attention of every layer."""
    return [layer.self_attn.forward for layer in model.model.layers]


def decoder_layers(model: Any) -> list[Layer]:
    """The ported forward of every layer."""
    return [layer.forward for layer in model.model.layers]


def row_parallel_projections(model: Any) -> list[nn.Linear]:
    """The projections that a tensor-parallel port splits along their input axis."""
    names = ("o_proj", "down_proj", "w2")
    return [m for path, m in model.named_modules() if path.rpartition(".")[2] in names and isinstance(m, nn.Linear)]


def make_port(model: Any, ranks: int = 2, reduce: str = "wide") -> Any:
    """Replace the forwards of a model by those of the port; returns the model."""
    for layer in model.model.layers:
        layer.self_attn.forward = Attention(layer.self_attn)
        layer.forward = Layer(layer)
    if ranks > 1:
        for projection in row_parallel_projections(model):
            projection.forward = row_parallel(projection, ranks, reduce)
    return model
