"""Porting bugs for the stand-in, each with the first site where it can be seen.

A fault changes the settings, the weights or one of the classes that the stand-in is built from, the way a real
port gets them wrong. ``site`` is a glob over the stand-in's module paths: in the order in which modules finish,
prefill before decode, the first one that diverges matches it, in ``phase``, and everything before it agrees with
the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .broken_layers import (
    DoublyScaled,
    ForgetsFirst,
    HalfPrecisionNorm,
    Interleaved,
    LateDecode,
    OffsetNorm,
    ResidualLost,
    ScaledEmbedding,
    SeesNext,
    TiledHeads,
    UnreducedMLP,
    UnwrittenKey,
    ValueBeforeKey,
    one_before_last,
)
from .stand_in_layers import Parts, Settings

Weights = dict[str, Tensor]
CORRECT = Parts()


@dataclass(frozen=True)
class Fault:
    """One bug: what it is, where and in which phase it first shows, and how it is planted."""

    name: str
    description: str
    site: str
    phase: Literal["prefill", "decode"] = "prefill"
    parts: Parts = CORRECT
    settings: Callable[[Settings], Settings] = lambda settings: settings
    weights: Callable[[Weights], Weights] = lambda weights: weights


def swap(weights: Weights, one: str, other: str) -> Weights:
    """Exchange ``one`` and ``other`` in the names of all weights."""
    renamed = {}
    for name, tensor in weights.items():
        target = name.replace(one, other) if one in name else name.replace(other, one)
        renamed[target] = tensor
    return renamed


def quantize_qkv(weights: Weights) -> Weights:
    """Pass the fused QKV weights through FP8 (E4M3) with one scale per tensor."""

    def quantize(tensor: Tensor) -> Tensor:
        scale = tensor.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        return ((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)

    return {name: quantize(tensor) if "Wqkv" in name else tensor for name, tensor in weights.items()}


def swap_vocabulary_shards(weights: Weights) -> Weights:
    """Exchange the two halves of the output vocabulary."""
    return weights | {"lm_head.weight": torch.cat(weights["lm_head.weight"].chunk(2)[::-1])}


def drop_final_gain(weights: Weights) -> Weights:
    """Leave the final norm's gain at its initial value, one."""
    return weights | {"norm.weight": torch.ones_like(weights["norm.weight"])}


CLEAN = Fault("clean", "The correct port.", site="")

_ALL = (
    Fault(
        "embedding-scale",
        "Embeddings are multiplied by the square root of the hidden size.",
        "embed_tokens",
        parts=Parts(embedding=ScaledEmbedding),
    ),
    Fault(
        "norm-epsilon",
        "RMSNorm adds 1e-3 instead of 1e-5.",
        "layers.0.input_layernorm",
        settings=lambda settings: replace(settings, norm_epsilon=1e-3),
    ),
    Fault(
        "bf16-variance",
        "RMSNorm computes variance and reciprocal root in BF16.",
        "layers.0.input_layernorm",
        parts=Parts(norm=HalfPrecisionNorm),
    ),
    Fault(
        "norm-offset",
        "RMSNorm multiplies by 1 + w instead of w.",
        "layers.0.input_layernorm",
        parts=Parts(norm=OffsetNorm),
    ),
    Fault(
        "fp8-qkv",
        "The fused QKV weights went through FP8 with one scale per tensor.",
        "layers.0.self_attn.qkv_proj.Wqkv",
        weights=quantize_qkv,
    ),
    Fault(
        "qkv-split-order",
        "The fused product is split as Q, V, K.",
        "layers.0.self_attn.qkv_proj",
        parts=Parts(qkv=ValueBeforeKey),
    ),
    Fault(
        "rope-base",
        "RoPE uses the base 500000 of Llama 3 instead of 10000.",
        "layers.0.self_attn.rotary_emb",
        settings=lambda settings: replace(settings, rope_theta=500000.0),
    ),
    Fault(
        "rope-scaling",
        "YaRN's slowed frequencies are ignored; its multiplier is kept.",
        "layers.0.self_attn.rotary_emb",
        settings=lambda settings: replace(settings, rope_factor=1.0),
    ),
    Fault(
        "missing-multiplier",
        "YaRN's attention factor on cos and sin is ignored.",
        "layers.0.self_attn.rotary_emb",
        settings=lambda settings: replace(settings, rope_multiplier=1.0),
    ),
    Fault(
        "decode-position",
        "Decoded tokens are rotated by one position too many.",
        "layers.0.self_attn.rotary_emb",
        "decode",
        parts=Parts(rotary=LateDecode),
    ),
    Fault(
        "attention-scale",
        "Scores are divided by the square root of the head size twice.",
        "layers.0.self_attn.o_proj",
        parts=Parts(attention=DoublyScaled),
    ),
    Fault(
        "rope-interleaved",
        "RoPE pairs neighbouring dimensions instead of halves.",
        "layers.0.self_attn.o_proj",
        parts=Parts(attention=Interleaved),
    ),
    Fault(
        "kv-head-order",
        "KV heads are tiled instead of repeated side by side.",
        "layers.0.self_attn.o_proj",
        parts=Parts(attention=TiledHeads),
    ),
    Fault(
        "causal-mask",
        "The causal mask of prefill is off by one: queries see the next token.",
        "layers.0.self_attn.o_proj",
        parts=Parts(attention=SeesNext),
    ),
    Fault(
        "decode-mask",
        "Decoded tokens cannot see the first cached position.",
        "layers.0.self_attn.o_proj",
        "decode",
        parts=Parts(attention=ForgetsFirst),
    ),
    Fault(
        "stale-cache",
        "The key of a decoded token is never written to the cache.",
        "layers.0.self_attn.o_proj",
        "decode",
        parts=Parts(attention=UnwrittenKey),
    ),
    Fault(
        "gate-up-swapped",
        "The gate and up projections hold each other's weights.",
        "layers.0.mlp.gate_proj",
        weights=lambda weights: swap(weights, "gate_proj", "up_proj"),
    ),
    Fault("activation", "The MLP uses GELU instead of SiLU.", "layers.0.mlp.act_fn", parts=Parts(activation=nn.GELU)),
    Fault(
        "missing-all-reduce",
        "The partial sums of down_proj are not reduced: rank 0's is used.",
        "layers.0.mlp.down_proj",
        parts=Parts(mlp=UnreducedMLP),
    ),
    Fault(
        "layer-order",
        "Layers 1 and 2 hold each other's weights.",
        "layers.1.input_layernorm",
        weights=lambda weights: swap(weights, "layers.1.", "layers.2."),
    ),
    Fault(
        "missing-residual",
        "Layer 2 drops the residual connection around attention.",
        "layers.2.post_attention_layernorm",
        parts=Parts(layer=ResidualLost),
    ),
    Fault("final-norm-gain", "The final norm's gain was not loaded and stays at one.", "norm", weights=drop_final_gain),
    Fault(
        "vocabulary-shards",
        "The shards of lm_head are gathered in the wrong order.",
        "lm_head",
        weights=swap_vocabulary_shards,
    ),
    Fault(
        "last-token",
        "Prefill takes its logits from the position before the last real one.",
        "lm_head",
        parts=Parts(last_real=one_before_last),
    ),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _ALL}
