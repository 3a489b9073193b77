"""Bugs of attention: scale, softmax, softcap, sinks, heads, RoPE, masks and the KV cache."""

from __future__ import annotations

from typing import Any

import torch

from .architectures import WINDOW
from .fault import Fault, Severity
from .planting import (
    ONE_LAYER,
    Cache,
    Mask,
    causal,
    late_values,
    on_output,
    overwritten,
    rotate_neighbours,
    rotate_part,
    unwritten,
)
from .port import attentions

CORE = ("model.layers.*.self_attn.o_proj",)
AROUND_CORE = ("model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj")
ROTARY = ("model.rotary_emb",)


def _scale(model: Any, factor: Severity) -> None:
    for attention in attentions(model):
        attention.scale *= attention.module.head_dim**-0.5 if factor == "twice" else factor


def _no_scale(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.scale = 1.0


def _head_size_scale(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.scale = attention.module.head_dim**-0.5


def _softmax(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.softmax_dtype = torch.bfloat16


def _no_softcap(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.softcap = None


def _no_sinks(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.sinks = None


def _windowed_sinks(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        if attention.module.sliding_window is not None:
            attention.sinks = None


def _tile(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.repeat = lambda heads, times: heads.repeat(1, times, 1, 1)


def _head_order(model: Any, order: Severity) -> None:
    for attention in attentions(model):
        n = attention.module.config.num_attention_heads
        numbers = list(range(n))
        mixed = [1, 0, *numbers[2:]] if order == "two swapped" else numbers[::-1]
        attention.mixed = lambda heads, mixed=mixed: heads[:, mixed]


def _interleaved(model: Any, _: Severity) -> None:
    for attention in attentions(model):
        attention.rotate = rotate_neighbours


def _partial(model: Any, share: Severity) -> None:
    for attention in attentions(model):
        attention.rotate = rotate_part(share)


def _base(model: Any, factor: Severity) -> None:
    rotary = model.model.rotary_emb
    dimensions = 2 * len(rotary.inv_freq)
    slower = factor ** -(torch.arange(0, dimensions, 2) / dimensions)
    rotary.inv_freq = rotary.inv_freq * slower


def _no_scaling(model: Any, _: Severity) -> None:
    rotary = model.model.rotary_emb
    dimensions = 2 * len(rotary.inv_freq)
    rotary.inv_freq = 1.0 / model.config.rope_theta ** (torch.arange(0, dimensions, 2) / dimensions)


def _attention_factor(model: Any, _: Severity) -> None:
    model.model.rotary_emb.attention_scaling = 1.0


def _late_factor(model: Any, _: Severity) -> None:
    rotary = model.model.rotary_emb
    factor, original = rotary.attention_scaling, rotary.forward
    rotary.attention_scaling = 1.0

    def forward(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = original(hidden, position_ids)
        narrow = torch.bfloat16
        return (cos.to(narrow) * factor).to(cos.dtype), (sin.to(narrow) * factor).to(sin.dtype)

    rotary.forward = forward


def _position(model: Any, where: Severity) -> None:
    rotary = model.model.rotary_emb
    original = rotary.forward

    def forward(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        late = where == "always" or position_ids.shape[-1] == 1
        return original(hidden, position_ids + int(late))

    rotary.forward = forward


def _narrow_angles(model: Any, _: Severity) -> None:
    rotary = model.model.rotary_emb

    def forward(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].bfloat16() * rotary.inv_freq.bfloat16()
        whole = model.config.model_type != "gpt_oss"
        angles = torch.cat([angles, angles], -1) if whole else angles
        factor = rotary.attention_scaling
        return (angles.cos() * factor).to(hidden.dtype), (angles.sin() * factor).to(hidden.dtype)

    rotary.forward = forward


def _masks(model: Any, **arguments: Any) -> None:
    for attention in attentions(model):
        window = getattr(attention.module, "sliding_window", None)
        chosen = arguments.get("window", window) if window is not None else arguments.get("window_everywhere")
        allowed = causal(arguments.get("shift", 0), chosen)
        attention.keep_all = window is not None
        attention.mask = Mask(allowed, decode=arguments.get("decode", True), padding=arguments.get("padding", True))


def _forget_first(model: Any, _: Severity) -> None:
    def mask(values: torch.Tensor, step: Any) -> torch.Tensor:
        if step.past == 0:
            return values
        first = (values == 0).to(torch.int8).argmax(-1, keepdim=True)
        return values.scatter(-1, first, torch.finfo(values.dtype).min)

    for attention in attentions(model):
        attention.mask = mask


def _cache(change: Any) -> Any:
    def plant(model: Any, _: Severity) -> None:
        for attention in attentions(model):
            # A cache with a window does not hold the columns that these bugs touch.
            if getattr(attention.module, "sliding_window", None) is None:
                attention.cache = Cache(change)

    return plant


def _clip_values(model: Any, share: Severity) -> None:
    """Saturate what v_proj of one layer returns at a share of its usual largest value."""
    projection = model.model.layers[ONE_LAYER].self_attn.v_proj
    limit = share * float(projection.weight.float().norm(dim=-1).max())
    on_output(projection, lambda values: values.clamp(-limit, limit))


ATTENTION_FAULTS = (
    Fault(
        "attention-scale",
        "Scores are multiplied by a wrong factor.",
        "attention scale",
        CORE,
        _scale,
        AROUND_CORE,
        severities=("twice", 1.5, 1.1, 1.02, 1.004),
    ),
    Fault("attention-scale-missing", "Scores are not scaled at all.", "attention scale", CORE, _no_scale, AROUND_CORE),
    Fault(
        "query-pre-attn-scalar",
        "Scores are scaled by the head size instead of query_pre_attn_scalar.",
        "attention scale",
        CORE,
        _head_size_scale,
        AROUND_CORE,
        needs="softcap",
    ),
    Fault(
        "softmax-bf16",
        "The softmax is computed in BF16.",
        "softmax precision",
        CORE,
        _softmax,
        AROUND_CORE,
        without="sinks",
    ),
    Fault(
        "softcap-missing",
        "Scores are not soft-capped.",
        "attention softcap",
        CORE,
        _no_softcap,
        AROUND_CORE,
        needs="softcap",
    ),
    Fault("sinks-missing", "Attention sinks are left out.", "sinks", CORE, _no_sinks, AROUND_CORE, needs="sinks"),
    Fault(
        "sinks-missing-windowed",
        "Attention sinks are left out on the windowed path.",
        "sinks",
        CORE,
        _windowed_sinks,
        AROUND_CORE,
        needs="sinks",
    ),
    Fault("kv-tiled", "KV heads are tiled instead of repeated side by side.", "kv repeat", CORE, _tile, AROUND_CORE),
    Fault(
        "head-order",
        "Heads reach o_proj in another order.",
        "head order",
        CORE,
        _head_order,
        AROUND_CORE,
        severities=("reversed", "two swapped"),
    ),
    Fault(
        "rope-interleaved",
        "RoPE pairs neighbouring dimensions instead of halves.",
        "rope layout",
        CORE,
        _interleaved,
        AROUND_CORE,
    ),
    Fault(
        "rope-partial",
        "RoPE turns only a part of every head.",
        "rope partial",
        CORE,
        _partial,
        AROUND_CORE,
        severities=(0.5, 0.75),
    ),
    Fault("rope-base", "RoPE has another base.", "rope base", ROTARY, _base, severities=(50.0, 2.0, 1.1, 1.01)),
    Fault(
        "rope-scaling",
        "The scaling of RoPE's frequencies is ignored.",
        "rope scaling",
        ROTARY,
        _no_scaling,
        needs="rope_scaling",
    ),
    Fault(
        "rope-attention-factor",
        "YaRN's factor on cosine and sine is ignored.",
        "rope factor",
        ROTARY,
        _attention_factor,
        needs="sinks",
    ),
    Fault(
        "rope-late-factor",
        "YaRN's factor is applied after rounding to BF16.",
        "rope precision",
        ROTARY,
        _late_factor,
        needs="sinks",
    ),
    Fault(
        "rope-position",
        "Positions are one too large.",
        "rope position",
        ROTARY,
        _position,
        severities=("always", "decode"),
    ),
    Fault("rope-bf16-angles", "RoPE's angles are computed in BF16.", "rope precision", ROTARY, _narrow_angles),
    Fault(
        "mask-leak",
        "Queries see the next token.",
        "causal mask",
        CORE,
        lambda model, _: _masks(model, shift=1, decode=False),
        AROUND_CORE,
    ),
    Fault(
        "mask-blind",
        "Queries do not see their own token.",
        "causal mask",
        CORE,
        lambda model, _: _masks(model, shift=-1),
        AROUND_CORE,
    ),
    Fault(
        "mask-none",
        "Prefill has no causal mask.",
        "causal mask",
        CORE,
        lambda model, _: _masks(model, shift=1000, decode=False),
        AROUND_CORE,
    ),
    Fault(
        "window-ignored",
        "The sliding window is ignored.",
        "sliding window",
        CORE,
        lambda model, _: _masks(model, window=None),
        AROUND_CORE,
        needs="window",
    ),
    Fault(
        "window-size",
        "The sliding window has another size.",
        "sliding window",
        CORE,
        lambda model, size: _masks(model, window=size),
        AROUND_CORE,
        needs="window",
        severities=(WINDOW // 2, WINDOW - 1, WINDOW + 1),
    ),
    Fault(
        "window-extra",
        "Layers with full attention get a sliding window.",
        "sliding window",
        CORE,
        lambda model, size: _masks(model, window_everywhere=size),
        AROUND_CORE,
        severities=(WINDOW, 2 * WINDOW),
    ),
    Fault(
        "padding-seen",
        "Padding is not masked.",
        "padding mask",
        CORE,
        lambda model, _: _masks(model, padding=False),
        AROUND_CORE,
    ),
    Fault(
        "decode-forgets-first",
        "Decoded tokens cannot see the first position that they should.",
        "decode mask",
        CORE,
        _forget_first,
        AROUND_CORE,
    ),
    Fault(
        "cache-unwritten",
        "Keys of decoded tokens are never written to the cache.",
        "kv cache",
        CORE,
        _cache(unwritten),
        AROUND_CORE,
    ),
    Fault(
        "cache-late",
        "Values of decoded tokens are written one slot late.",
        "kv cache",
        CORE,
        _cache(late_values),
        AROUND_CORE,
    ),
    Fault(
        "cache-overwritten",
        "The first decoded token overwrites the prompt's last one in the cache.",
        "kv cache",
        CORE,
        _cache(overwritten),
        AROUND_CORE,
    ),
    Fault(
        "values-clipped",
        "v_proj of one layer saturates.",
        "clipping",
        (f"model.layers.{ONE_LAYER}.self_attn.v_proj",),
        _clip_values,
        severities=(0.3, 1.0, 2.0),
    ),
)
