"""How bugs get into a port: changed weights, wrapped outputs, exchanged parts of attention, layers and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .port import Step

Model = Any
#: The layer of bugs that sit in one layer only.
ONE_LAYER = 1
LAYER = f"model.layers.{ONE_LAYER}"


def modules(model: Model, *names: str) -> Iterator[tuple[str, Any]]:
    """Modules whose last path element is one of the names, in order."""
    return ((path, module) for path, module in model.named_modules() if path.rpartition(".")[2] in names)


def attention_part(name: str) -> tuple[str, ...]:
    """A module of the one layer's attention, as a fault's own place."""
    return (f"{LAYER}.self_attn.{name}",)


def norms(model: Model) -> list[Any]:
    """Every normalisation of the model."""
    return [module for path, module in model.named_modules() if path.rpartition(".")[2].endswith("norm")]


def epsilon_name(norm: Any) -> str:
    """The attribute that holds a norm's epsilon."""
    return "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"


def on_output(module: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change what a module returns; of a tuple, its first element."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.forward = forward


def times(factor: float) -> Callable[[Tensor], Tensor]:
    """Multiply, and keep the dtype."""
    return lambda values: values * factor


def set_weight(module: Any, weight: Tensor, name: str = "weight") -> None:
    """Give a module another weight."""
    setattr(module, name, nn.Parameter(weight.contiguous(), requires_grad=False))


def rms_norm(norm: Any, hidden: Tensor, *, offset: bool, centre: bool = False, narrow: bool = False) -> Tensor:
    """An RMSNorm with its details to choose.

    Args:
        norm: where gain and epsilon come from.
        hidden: `[..., h]`.
        offset: the gain is 1 + w.
        centre: subtract the mean first, as LayerNorm does.
        narrow: compute variance and reciprocal root in the model's dtype.
    """
    wide = hidden if narrow else hidden.float()
    if narrow and hidden.dtype == torch.float32:
        wide = hidden.bfloat16()
    if centre:
        wide = wide - wide.mean(-1, keepdim=True)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + getattr(norm, epsilon_name(norm)))
    gain = norm.weight + 1.0 if offset else norm.weight
    return scaled.to(hidden.dtype) * gain


# Masks: `mask` is additive, [b, 1, s, p], the dtype's minimum where a key is hidden.


class Mask:
    """Replaces a layer's mask by one from scratch; padding, known since prefill, stays hidden unless told otherwise."""

    def __init__(
        self, allowed: Callable[[Tensor, Tensor], Tensor], *, decode: bool = True, padding: bool = True
    ) -> None:
        """Say which keys are seen.

        Args:
            allowed: from the columns of queries `[s, 1]` and keys `[1, p]` to `[s, p]`.
            decode: replace the mask of decode steps too.
            padding: hide padding.
        """
        self._allowed, self._decode, self._padding = allowed, decode, padding
        self._real = torch.ones(0)

    def __call__(self, mask: Tensor, step: Step) -> Tensor:
        """The replaced mask."""
        if step.past == 0:
            self._real = torch.diagonal(mask[:, 0], dim1=-2, dim2=-1) == 0
        else:
            self._real = torch.cat([self._real, mask[:, 0, -1, -1:] == 0], -1)
            if not self._decode and mask.shape[-1] == step.held:
                return mask
        end = step.past + step.new
        seen = self._allowed(torch.arange(step.past, end)[:, None], torch.arange(end - step.held, end)[None, :])
        if self._padding:
            seen = seen & self._real[:, None, None, -step.held :]
        values = torch.where(seen, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
        return values.expand(len(mask), 1, step.new, step.held)


def causal(shift: int = 0, window: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Keys up to the query's own place plus `shift`, and within a window when there is one."""

    def allowed(query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query + shift
        return seen if window is None else seen & (key > query - window)

    return allowed


# RoPE


def rotate_neighbours(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE that pairs neighbouring dimensions, though the weights pair halves."""
    half = heads.shape[-1] // 2
    cos = cos[:, None, :, :half].repeat_interleave(2, -1)
    sin = sin[:, None, :, :half].repeat_interleave(2, -1)
    turned = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
    return heads * cos + turned * sin


def rotate_part(share: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """RoPE on the first part of a head only."""

    def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width, whole = int(heads.shape[-1] * share), heads.shape[-1]
        half = whole // 2
        cos, sin = cos[:, None, :, : width // 2], sin[:, None, :, : width // 2]
        left, right, rest = heads[..., : width // 2], heads[..., width // 2 : width], heads[..., width:]
        assert half >= width // 2
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)

    return rotate


# KV cache: key and value are [b, g, p, d]; a fault sees them after the cache returned them.


class Cache:
    """What goes wrong between writing and reading the cache during decode, for one layer."""

    def __init__(self, change: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
        """`change` gets key, value and the number of positions that prefill wrote."""
        self._change, self._prefilled = change, 0

    def __call__(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Pass prefill through; change what decode reads."""
        if step.past == 0:
            self._prefilled = step.new
            return key, value
        return self._change(key.clone(), value.clone(), self._prefilled)


def unwritten(key: Tensor, value: Tensor, prefilled: int) -> tuple[Tensor, Tensor]:
    """Keys of decoded tokens stay as allocated, zero."""
    key[:, :, prefilled:] = 0
    return key, value


def late_values(key: Tensor, value: Tensor, prefilled: int) -> tuple[Tensor, Tensor]:
    """Values of decoded tokens are one slot late: each slot holds what belongs into the one before."""
    value[:, :, prefilled:] = value[:, :, prefilled - 1 : -1].clone()
    return key, value


def overwritten(key: Tensor, value: Tensor, prefilled: int) -> tuple[Tensor, Tensor]:
    """The first decoded token was written over the prompt's last one."""
    key[:, :, prefilled - 1], value[:, :, prefilled - 1] = key[:, :, prefilled], value[:, :, prefilled]
    return key, value


# Experts


def route(logits: Tensor, top_k: int, kind: str) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the chosen experts, both `[tokens, k]`.

    Args:
        logits: `[tokens, experts]`.
        top_k: how many experts a token goes to.
        kind: `correct` (softmax over the chosen), `uniform`, `unnormalised` (softmax over all, not rescaled),
            `fewer`, `more` or `sigmoid`.
    """
    if kind in ("fewer", "more"):
        top_k += 1 if kind == "more" else -1
    values, chosen = logits.topk(top_k, dim=-1)
    if kind == "uniform":
        return torch.full_like(values, 1 / top_k), chosen
    if kind == "unnormalised":
        return logits.float().softmax(-1).gather(1, chosen).to(logits.dtype), chosen
    if kind == "sigmoid":
        return values.float().sigmoid().to(logits.dtype), chosen
    return values.float().softmax(-1).to(logits.dtype), chosen


def reroute_mixtral(block: Any, kind: str) -> None:
    """Give a Mixtral block another routing."""

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = block.gate(flat)
        weights, chosen = route(logits, block.top_k, kind)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(block.experts):
            token, place = torch.where(chosen == number)
            if len(token):
                total.index_add_(0, token, (expert(flat[token]) * weights[token, place, None]).to(flat.dtype))
        return total.reshape(hidden.shape), logits

    block.forward = forward


def reroute_gpt_oss(router: Any, kind: str) -> None:
    """Give a gpt-oss router another rule."""

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight, router.bias)
        weights, chosen = route(logits, router.top_k, kind)
        return torch.zeros_like(logits).scatter_(1, chosen, weights), chosen

    router.forward = forward


def experts_of_gpt_oss(
    experts: Any, *, interleaved: bool = True, offset: float = 1.0, alpha: float = 1.702, limit: float = 7.0
) -> None:
    """Give gpt-oss experts another gated unit: layout of gate and up, offset of up, slope and clamp."""

    def forward(hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        total = torch.zeros_like(flat)
        for number in range(experts.num_experts):
            token = torch.where((router_indices == number).any(-1))[0]
            if not len(token):
                continue
            both = flat[token] @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
            gate, up = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, -1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            mixed = (up + offset) * (gate * torch.sigmoid(gate * alpha))
            out = mixed @ experts.down_proj[number] + experts.down_proj_bias[number]
            total.index_add_(0, token, (out * routing_weights[token, number, None]).to(flat.dtype))
        return total.reshape(hidden.shape)

    experts.forward = forward


# Quantisation


def quantised(weight: Tensor, kind: str) -> Tensor:
    """A weight that went through a narrow format and back.

    Args:
        weight: `[out, in]`.
        kind: `fp8` (E4M3, one scale per tensor), `int8` (one scale per tensor), `int8-row` or `int4-row`
            (one scale per output).
    """
    wide = weight.float()
    if kind == "fp8":
        scale = wide.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
    top = 7 if kind.startswith("int4") else 127
    scale = wide.abs().amax(-1, keepdim=True) / top if kind.endswith("row") else wide.abs().max() / top
    return ((wide / scale).round().clamp(-top, top) * scale).to(weight.dtype)


def replaced_shards(weight: Tensor, ranks: int = 2) -> Tensor:
    """Rank 0's shard of the output axis on every rank."""
    return torch.cat([weight.chunk(ranks, 0)[0]] * ranks)
