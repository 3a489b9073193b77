"""Bugs of MLP, experts, residual stream and reductions, and values that leave their range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fault import Fault, Severity
from .planting import (
    LAYER,
    ONE_LAYER,
    attention_part,
    experts_of_gpt_oss,
    modules,
    on_output,
    reroute_gpt_oss,
    reroute_mixtral,
    set_weight,
    times,
)
from .port import decoder_layers, partial_products


def _layer(model: Any) -> Any:
    return model.model.layers[ONE_LAYER]


# MLP and experts


class _Activation(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, values: Tensor) -> Tensor:
        functional = nn.functional
        if self.kind == "quick_gelu":
            return values * torch.sigmoid(1.702 * values)
        if self.kind == "gelu":
            return functional.gelu(values)
        return functional.silu(values) if self.kind == "silu" else functional.relu(values)


def _activation(model: Any, kind: Severity) -> None:
    for _path, block in modules(model, "act_fn"):
        block.forward = _Activation(kind).forward


def _gate_up(first: str, second: str) -> Any:
    def plant(model: Any, _: Severity) -> None:
        for _path, module in list(model.named_modules()):
            if hasattr(module, first) and hasattr(module, second):
                one, other = getattr(module, first).weight, getattr(module, second).weight
                set_weight(getattr(module, first), other)
                set_weight(getattr(module, second), one)

    return plant


def _gpt_oss_experts(**arguments: Any) -> Any:
    def plant(model: Any, _: Severity) -> None:
        for _path, experts in modules(model, "experts"):
            experts_of_gpt_oss(experts, **arguments)

    return plant


def _expert_bias(model: Any, _: Severity) -> None:
    for _path, experts in modules(model, "experts"):
        set_weight(experts, experts.down_proj_bias * 0, "down_proj_bias")


def _router_bias(model: Any, _: Severity) -> None:
    for _path, router in modules(model, "router"):
        set_weight(router, router.bias * 0, "bias")


def _routing(kind: str) -> Any:
    def plant(model: Any, _: Severity) -> None:
        for _path, block in modules(model, "block_sparse_moe"):
            reroute_mixtral(block, kind)
        for _path, router in modules(model, "router"):
            reroute_gpt_oss(router, kind)

    return plant


def _expert_order(model: Any, _: Severity) -> None:
    for layer in model.model.layers:
        if hasattr(layer, "block_sparse_moe"):
            block = layer.block_sparse_moe
            forwards = [expert.forward for expert in block.experts]
            for expert, forward in zip(block.experts, forwards[1:] + forwards[:1], strict=True):
                expert.forward = forward
        else:
            experts = layer.mlp.experts
            for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
                set_weight(experts, getattr(experts, name).roll(-1, 0), name)


# Residual stream and reductions


def _residual(where: str) -> Any:
    def plant(model: Any, factor: Severity) -> None:
        layer = decoder_layers(model)[ONE_LAYER]
        keep = 0.0 if factor is None else factor
        setattr(layer, where, lambda residual, added: residual * keep + added)

    return plant


def _branch_scale(model: Any, factor: Severity) -> None:
    for layer in decoder_layers(model):
        layer.add_mlp = lambda residual, added: residual + added * factor


def _unreduced(*names: str) -> Any:
    def plant(model: Any, how: Severity) -> None:
        for _path, projection in modules(_layer(model), *names):
            if how == "doubled":
                on_output(projection, times(2.0))
            else:
                _first_rank_only(projection)

    return plant


def _first_rank_only(projection: Any) -> None:
    def forward(hidden: Tensor) -> Tensor:
        part = partial_products(projection, hidden, 2)[0]
        return part if projection.bias is None else part + projection.bias

    projection.forward = forward


def _expert_reduction(model: Any, _: Severity) -> None:
    for _path, experts in modules(_layer(model), "experts"):
        weight = experts.down_proj.clone()
        weight[:, weight.shape[1] // 2 :] = 0
        set_weight(experts, weight, "down_proj")


# Values that leave their range


def _clip(model: Any, limit: Severity) -> None:
    layer = decoder_layers(model)[ONE_LAYER]
    layer.add_mlp = lambda residual, added: (residual + added).clamp(-limit, limit)


def _overflow(model: Any, limit: Severity) -> None:
    def overflow(values: Tensor) -> Tensor:
        return torch.where(values.abs() > limit, values.sign() * float("inf"), values)

    layer = decoder_layers(model)[ONE_LAYER]
    layer.add_mlp = lambda residual, added: overflow(residual + added)


def _nan(model: Any, _: Severity) -> None:
    def spoil(values: Tensor) -> Tensor:
        spoilt = values.clone()
        spoilt[:, -1, 5] = float("nan")
        return spoilt

    on_output(_layer(model).self_attn.o_proj, spoil)


AFTER_ATTENTION = (f"{LAYER}.post_attention_layernorm", f"{LAYER}.pre_feedforward_layernorm")
AFTER_LAYER = (LAYER, f"model.layers.{ONE_LAYER + 1}.input_layernorm")
MOE = ("model.layers.*.block_sparse_moe", "model.layers.*.mlp.experts", "model.layers.*.mlp.router")
AROUND_MOE = (
    "model.layers.{}.block_sparse_moe",
    "model.layers.{}.mlp",
    "model.layers.{}.mlp.experts",
    "model.layers.{}.mlp.router",
)
#: Where a bug within experts shows first: those that are modules of their own among them.
AROUND_EXPERTS = (*AROUND_MOE, "model.layers.{}.block_sparse_moe.experts*")

BLOCK_FAULTS = (
    Fault(
        "activation",
        "The MLP has another activation.",
        "activation",
        ("model.layers.*.mlp.act_fn",),
        _activation,
        ("model.layers.{}.mlp", "model.layers.{}.mlp.down_proj"),
        needs="dense",
        without="offset_norm",
        severities=("relu", "gelu", "quick_gelu"),
    ),
    Fault(
        "activation-gemma",
        "The MLP has another activation.",
        "activation",
        ("model.layers.*.mlp.act_fn",),
        _activation,
        ("model.layers.{}.mlp", "model.layers.{}.mlp.down_proj"),
        needs="offset_norm",
        severities=("relu", "silu", "quick_gelu", "gelu"),
    ),
    Fault(
        "gate-up-swapped",
        "Gate and up have each other's weights.",
        "exchanged",
        ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
        _gate_up("gate_proj", "up_proj"),
        ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        needs="dense",
    ),
    Fault(
        "expert-gate-up-swapped",
        "Gate and up of every expert have each other's weights.",
        "gate up swapped",
        MOE,
        _gate_up("w1", "w3"),
        AROUND_EXPERTS,
        needs="split_experts",
    ),
    Fault(
        "expert-layout",
        "Gate and up of the experts are taken as halves, not as neighbours.",
        "expert layout",
        MOE,
        _gpt_oss_experts(interleaved=False),
        AROUND_EXPERTS,
        needs="fused_experts",
    ),
    Fault(
        "expert-activation",
        "The experts' gate is silu instead of its 1.702 variant.",
        "activation",
        MOE,
        _gpt_oss_experts(alpha=1.0),
        AROUND_EXPERTS,
        needs="fused_experts",
    ),
    Fault(
        "expert-offset",
        "The experts multiply by up instead of up + 1.",
        "activation",
        MOE,
        _gpt_oss_experts(offset=0.0),
        AROUND_EXPERTS,
        needs="fused_experts",
    ),
    Fault(
        "expert-bias",
        "The experts' output bias is missing.",
        "expert bias",
        MOE,
        _expert_bias,
        AROUND_EXPERTS,
        needs="fused_experts",
    ),
    Fault(
        "router-bias",
        "The router's bias is missing.",
        "missing bias",
        ("model.layers.*.mlp.router",),
        _router_bias,
        AROUND_MOE,
        needs="router_bias",
    ),
    Fault(
        "routing-uniform",
        "Chosen experts count the same.",
        "routing ignored",
        MOE,
        _routing("uniform"),
        AROUND_MOE,
        needs="moe",
    ),
    Fault(
        "routing-unnormalised",
        "Softmax runs over all experts, and the chosen ones are not rescaled.",
        "routing unnormalised",
        MOE,
        _routing("unnormalised"),
        AROUND_MOE,
        needs="moe",
    ),
    Fault(
        "routing-sigmoid",
        "Experts are weighted by a sigmoid.",
        "routing function",
        MOE,
        _routing("sigmoid"),
        AROUND_MOE,
        needs="moe",
    ),
    Fault(
        "routing-fewer", "One expert less is chosen.", "routing top-k", MOE, _routing("fewer"), AROUND_MOE, needs="moe"
    ),
    Fault(
        "routing-more", "One expert more is chosen.", "routing top-k", MOE, _routing("more"), AROUND_MOE, needs="moe"
    ),
    Fault(
        "expert-order",
        "Tokens reach the next expert's weights.",
        "expert order",
        MOE,
        _expert_order,
        AROUND_EXPERTS,
        needs="moe",
    ),
    Fault(
        "residual-attention",
        "The residual connection around attention is multiplied by a factor, or missing.",
        {
            None: "missing residual",
            0.5: "residual multiplier",
            1.02: "residual multiplier",
            1.004: "residual multiplier",
        },
        AFTER_ATTENTION,
        _residual("add_attention"),
        (LAYER,),
        severities=(None, 0.5, 1.02, 1.004),
    ),
    Fault(
        "residual-mlp",
        "The residual connection around the MLP is missing.",
        "missing residual",
        AFTER_LAYER,
        _residual("add_mlp"),
    ),
    Fault(
        "residual-multiplier",
        "What every MLP adds to the residual stream is multiplied by a factor.",
        "residual multiplier",
        ("model.layers.?",),
        _branch_scale,
        tuple(f"model.layers.{n}.input_layernorm" for n in (1, 2)),
        severities=(0.22, 1.1, 1.02),
    ),
    Fault(
        "reduce-mlp",
        "The all-reduce of down_proj is missing (rank 0's part is used) or done twice.",
        {"missing": "missing all-reduce", "doubled": "doubled all-reduce"},
        (f"{LAYER}.mlp.down_proj",),
        _unreduced("down_proj"),
        (f"{LAYER}.mlp",),
        needs="dense",
        severities=("missing", "doubled"),
    ),
    Fault(
        "reduce-attention",
        "The all-reduce of o_proj is missing (rank 0's part is used) or done twice.",
        {"missing": "missing all-reduce", "doubled": "doubled all-reduce"},
        attention_part("o_proj"),
        _unreduced("o_proj"),
        (f"{LAYER}.self_attn",),
        severities=("missing", "doubled"),
    ),
    Fault(
        "reduce-experts",
        "The all-reduce of the experts is missing: half of their inner dimension is used.",
        "missing all-reduce",
        (f"{LAYER}.mlp.experts",),
        _expert_reduction,
        (f"{LAYER}.mlp",),
        needs="fused_experts",
    ),
    Fault(
        "clipped",
        "The residual stream saturates after one layer.",
        "clipping",
        AFTER_LAYER,
        _clip,
        severities=(1.0, 4.0, 20.0),
    ),
    Fault(
        "overflow",
        "The residual stream overflows to infinity after one layer.",
        "infinite",
        AFTER_LAYER,
        _overflow,
        severities=(8.0,),
    ),
    Fault(
        "nan", "One value of o_proj is not a number.", "nan", attention_part("o_proj"), _nan, (f"{LAYER}.self_attn",)
    ),
)
