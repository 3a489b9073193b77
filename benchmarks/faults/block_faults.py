"""Bugs outside attention's core: embedding, norms, projections, MLP, experts, residual stream, reductions, logits."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .fault import Fault, Severity
from .planting import (
    ONE_LAYER,
    epsilon_name,
    experts_of_gpt_oss,
    modules,
    norms,
    on_output,
    quantised,
    replaced_shards,
    reroute_gpt_oss,
    reroute_mixtral,
    rms_norm,
    set_weight,
    times,
)
from .port import decoder_layers, partial_products

LAYER = f"model.layers.{ONE_LAYER}"
NORMS = ("*norm",)


def _layer(model: Any) -> Any:
    return model.model.layers[ONE_LAYER]


# Embedding and logits


def _embedding(model: Any, factor: Severity) -> None:
    on_output(model.model.embed_tokens, times(math.sqrt(model.config.hidden_size) if factor == "sqrt(h)" else factor))


def _no_normalizer(model: Any, _: Severity) -> None:
    model.model.config = copy.deepcopy(model.model.config)
    model.model.config.hidden_size = 1


def _embedding_shard(model: Any, _: Severity) -> None:
    embedding = model.model.embed_tokens
    weight = embedding.weight.clone()
    weight[len(weight) // 4 + 35 :] = 0
    set_weight(embedding, weight)


def _logits(model: Any, factor: Severity) -> None:
    on_output(model.lm_head, times(factor))


def _no_final_softcap(model: Any, _: Severity) -> None:
    model.config = copy.deepcopy(model.config)
    model.config.final_logit_softcapping = None


def _vocabulary_order(model: Any, _: Severity) -> None:
    first, second = model.lm_head.weight.chunk(2)
    set_weight(model.lm_head, torch.cat([second, first]))


# Norms


def _epsilon(model: Any, factor: Severity) -> None:
    for norm in norms(model):
        setattr(norm, epsilon_name(norm), getattr(norm, epsilon_name(norm)) * factor)


def _norm_forward(**arguments: Any) -> Any:
    def plant(model: Any, _: Severity) -> None:
        is_gemma = model.config.model_type == "gemma2"
        chosen = {"offset": is_gemma, **arguments}
        if chosen.pop("wrong_offset", False):
            chosen["offset"] = not is_gemma
        for norm in norms(model):
            norm.forward = lambda hidden, norm=norm: rms_norm(norm, hidden, **chosen)

    return plant


def _gain_lost(model: Any, _: Severity) -> None:
    norm = model.model.norm
    set_weight(norm, torch.zeros_like(norm.weight) if model.config.model_type == "gemma2" else norm.weight * 0 + 1)


def _gain_of_next_layer(model: Any, _: Severity) -> None:
    set_weight(_layer(model).input_layernorm, model.model.layers[ONE_LAYER + 1].input_layernorm.weight)


def _no_qk_norm(model: Any, _: Severity) -> None:
    for _path, norm in modules(model, "q_norm", "k_norm"):
        norm.forward = lambda hidden: hidden


def _qk_norms_swapped(model: Any, _: Severity) -> None:
    for layer in model.model.layers:
        query, key = layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight
        set_weight(layer.self_attn.q_norm, key)
        set_weight(layer.self_attn.k_norm, query)


def _no_post_norm(model: Any, _: Severity) -> None:
    for _path, norm in modules(model, "post_feedforward_layernorm"):
        norm.forward = lambda hidden: hidden


# Projections


def _qkv_bias(model: Any, factor: Severity) -> None:
    for _path, projection in modules(model, "q_proj", "k_proj", "v_proj"):
        set_weight(projection, projection.bias * factor, "bias")


def _value_bias(model: Any, _: Severity) -> None:
    for _path, projection in modules(model, "v_proj"):
        set_weight(projection, projection.bias * 0, "bias")


def _bias_on_every_rank(model: Any, _: Severity) -> None:
    for _path, projection in modules(model, "o_proj"):
        set_weight(projection, projection.bias * 2, "bias")


def _projection_scale(model: Any, factor: Severity) -> None:
    on_output(_layer(model).self_attn.o_proj, times(factor))


def _transposed(name: str) -> Any:
    def plant(model: Any, _: Severity) -> None:
        projection = getattr(_layer(model).self_attn, name)
        set_weight(projection, projection.weight.t())

    return plant


def _permuted(model: Any, _: Severity) -> None:
    projection = _layer(model).self_attn.k_proj
    order = torch.randperm(len(projection.weight), generator=torch.Generator().manual_seed(3))
    set_weight(projection, projection.weight[order])
    if projection.bias is not None:
        set_weight(projection, projection.bias[order], "bias")


def _weight_of_next_layer(name: str) -> Any:
    def plant(model: Any, _: Severity) -> None:
        projection = getattr(_layer(model).self_attn, name)
        other = getattr(model.model.layers[ONE_LAYER + 1].self_attn, name)
        set_weight(projection, other.weight)

    return plant


def _layers_swapped(model: Any, _: Severity) -> None:
    one, other = _layer(model), model.model.layers[ONE_LAYER + 1]
    first, second = copy.deepcopy(dict(one.named_parameters())), dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.copy_(second[name])
        for name, parameter in other.named_parameters():
            parameter.copy_(first[name])


def _rank_zero(*names: str) -> Any:
    def plant(model: Any, _: Severity) -> None:
        for _path, projection in modules(_layer(model), *names):
            set_weight(projection, replaced_shards(projection.weight))
            if projection.bias is not None:
                set_weight(projection, replaced_shards(projection.bias), "bias")

    return plant


def _quantise(model: Any, kind: Severity) -> None:
    for _path, projection in modules(_layer(model), "q_proj", "k_proj", "v_proj", "o_proj"):
        set_weight(projection, quantised(projection.weight, kind))


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


def _one(name: str) -> tuple[str, ...]:
    return (f"{LAYER}.self_attn.{name}",)


QKV = tuple(f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
SAME_LAYER_QKV = tuple(f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
AFTER_ATTENTION = (f"{LAYER}.post_attention_layernorm", f"{LAYER}.pre_feedforward_layernorm")
AFTER_LAYER = (LAYER, f"model.layers.{ONE_LAYER + 1}.input_layernorm")
MOE = ("model.layers.*.block_sparse_moe", "model.layers.*.mlp.experts", "model.layers.*.mlp.router")
AROUND_MOE = (
    "model.layers.{}.block_sparse_moe",
    "model.layers.{}.block_sparse_moe.experts*",
    "model.layers.{}.mlp",
    "model.layers.{}.mlp.experts",
    "model.layers.{}.mlp.router",
)

BLOCK_FAULTS = (
    Fault(
        "embedding-scale",
        "Embeddings are multiplied by a factor.",
        "embedding multiplier",
        ("model.embed_tokens",),
        _embedding,
        severities=("sqrt(h)", 1.1, 1.02, 1.004),
    ),
    Fault(
        "embedding-normalizer",
        "Embeddings are not multiplied by the root of the hidden size.",
        "embedding multiplier",
        ("model.layers.0.input_layernorm",),
        _no_normalizer,
        ("model.layers.0", "model.embed_tokens", "model.layers.0.pre_feedforward_layernorm"),
        needs="embedding_scale",
    ),
    Fault(
        "embedding-shard",
        "Rank 0's part of the vocabulary is embedded, the rest is zero: the all-reduce is missing.",
        "missing all-reduce",
        ("model.embed_tokens",),
        _embedding_shard,
    ),
    Fault(
        "logits-scale",
        "Logits are multiplied by a factor.",
        "logits multiplier",
        ("lm_head",),
        _logits,
        severities=(1.5, 1.1, 1.02, 1.004),
    ),
    Fault(
        "final-softcap",
        "Logits are not soft-capped.",
        "logits softcap",
        ("",),
        _no_final_softcap,
        needs="softcap",
    ),
    Fault(
        "vocabulary-order",
        "The shards of lm_head are gathered in the wrong order.",
        "permuted weight",
        ("lm_head",),
        _vocabulary_order,
    ),
    Fault(
        "norm-epsilon",
        "Norms add a larger epsilon.",
        "norm epsilon",
        NORMS,
        _epsilon,
        severities=(1e4, 1e3, 1e2, 1e1),
    ),
    Fault(
        "norm-bf16-variance",
        "Norms compute the variance in BF16.",
        "norm precision",
        NORMS,
        _norm_forward(narrow=True),
    ),
    Fault(
        "norm-offset",
        "Norms multiply by 1 + w instead of w, or by w instead of 1 + w.",
        "norm offset",
        NORMS,
        _norm_forward(wrong_offset=True),
    ),
    Fault("norm-layernorm", "Norms subtract the mean.", "norm kind", NORMS, _norm_forward(centre=True)),
    Fault("norm-gain-lost", "The final norm's gain was not loaded.", "norm gain", ("model.norm",), _gain_lost),
    Fault(
        "norm-gain-of-next-layer",
        "A norm has the gain of the next layer's.",
        "another layer's weight",
        (f"{LAYER}.input_layernorm",),
        _gain_of_next_layer,
    ),
    Fault(
        "qk-norm-missing",
        "Queries and keys are not normalised.",
        "missing norm",
        ("*.q_norm", "*.k_norm"),
        _no_qk_norm,
        ("model.layers.{}.self_attn.q_norm", "model.layers.{}.self_attn.k_norm"),
        needs="qk_norm",
    ),
    Fault(
        "qk-norms-swapped",
        "The norms of queries and keys have each other's gain.",
        "norm gain",
        ("*.q_norm", "*.k_norm"),
        _qk_norms_swapped,
        ("model.layers.{}.self_attn.q_norm", "model.layers.{}.self_attn.k_norm"),
        needs="qk_norm",
    ),
    Fault(
        "post-norm-missing",
        "The norm after the MLP is left out.",
        "missing norm",
        ("model.layers.*.post_feedforward_layernorm",),
        _no_post_norm,
        needs="offset_norm",
    ),
    Fault(
        "qkv-bias",
        "The biases of Q, K and V are multiplied by a factor: 0 is missing, 2 is doubled.",
        "bias",
        QKV,
        _qkv_bias,
        SAME_LAYER_QKV,
        needs="qkv_bias",
        severities=(0.0, 2.0, 1.1, 1.02),
    ),
    Fault(
        "value-bias-missing",
        "The bias of V is missing.",
        "bias",
        ("model.layers.*.self_attn.v_proj",),
        _value_bias,
        needs="qkv_bias",
    ),
    Fault(
        "output-bias-doubled",
        "Every rank adds the bias of o_proj.",
        "bias",
        ("model.layers.*.self_attn.o_proj",),
        _bias_on_every_rank,
        ("model.layers.{}.self_attn",),
        needs="qkv_bias",
    ),
    Fault(
        "projection-scale",
        "o_proj of one layer is multiplied by a factor.",
        "multiplier",
        _one("o_proj"),
        _projection_scale,
        (f"{LAYER}.self_attn",),
        severities=(1.5, 1.1, 1.02, 1.004),
    ),
    Fault(
        "weight-transposed",
        "A square weight is transposed.",
        "transposed weight",
        _one("q_proj"),
        _transposed("q_proj"),
        needs="square_q",
    ),
    Fault(
        "weight-transposed-output",
        "A square o_proj is transposed.",
        "transposed weight",
        _one("o_proj"),
        _transposed("o_proj"),
        (f"{LAYER}.self_attn",),
        needs="square_q",
    ),
    Fault("weight-permuted", "The rows of k_proj are permuted.", "permuted weight", _one("k_proj"), _permuted),
    Fault(
        "weight-of-next-layer",
        "v_proj has the weight of the next layer's.",
        "another layer's weight",
        _one("v_proj"),
        _weight_of_next_layer("v_proj"),
    ),
    Fault(
        "layers-swapped",
        "Two layers have each other's weights.",
        "another layer's weight",
        (f"{LAYER}.input_layernorm",),
        _layers_swapped,
    ),
    Fault(
        "rank-zero-qkv",
        "Every rank has rank 0's shard of Q, K and V.",
        "rank zero shard",
        tuple(f"{LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
        _rank_zero("q_proj", "k_proj", "v_proj"),
        SAME_LAYER_QKV,
    ),
    Fault(
        "rank-zero-up",
        "Every rank has rank 0's shard of up_proj.",
        "rank zero shard",
        (f"{LAYER}.mlp.up_proj",),
        _rank_zero("up_proj"),
        needs="dense",
    ),
    Fault(
        "weights-quantised",
        "The attention weights of one layer went through a narrow format.",
        "quantised weight",
        tuple(f"{LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        _quantise,
        SAME_LAYER_QKV,
        severities=("int4-row", "fp8", "int8", "int8-row"),
    ),
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
        "gate up swapped",
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
        AROUND_MOE,
        needs="split_experts",
    ),
    Fault(
        "expert-layout",
        "Gate and up of the experts are taken as halves, not as neighbours.",
        "gate up swapped",
        MOE,
        _gpt_oss_experts(interleaved=False),
        AROUND_MOE,
        needs="fused_experts",
    ),
    Fault(
        "expert-activation",
        "The experts' gate is silu instead of its 1.702 variant.",
        "activation",
        MOE,
        _gpt_oss_experts(alpha=1.0),
        AROUND_MOE,
        needs="fused_experts",
    ),
    Fault(
        "expert-offset",
        "The experts multiply by up instead of up + 1.",
        "activation",
        MOE,
        _gpt_oss_experts(offset=0.0),
        AROUND_MOE,
        needs="fused_experts",
    ),
    Fault(
        "expert-bias",
        "The experts' output bias is missing.",
        "bias",
        MOE,
        _expert_bias,
        AROUND_MOE,
        needs="fused_experts",
    ),
    Fault(
        "router-bias",
        "The router's bias is missing.",
        "bias",
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
        "routing unnormalised",
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
        AROUND_MOE,
        needs="moe",
    ),
    Fault(
        "residual-attention",
        "The residual connection around attention is multiplied by a factor, or missing.",
        "residual",
        AFTER_ATTENTION,
        _residual("add_attention"),
        (LAYER,),
        severities=(None, 0.5, 1.02, 1.004),
    ),
    Fault(
        "residual-mlp",
        "The residual connection around the MLP is missing.",
        "residual",
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
        "missing all-reduce",
        (f"{LAYER}.mlp.down_proj",),
        _unreduced("down_proj"),
        (f"{LAYER}.mlp",),
        needs="dense",
        severities=("missing", "doubled"),
    ),
    Fault(
        "reduce-attention",
        "The all-reduce of o_proj is missing (rank 0's part is used) or done twice.",
        "missing all-reduce",
        _one("o_proj"),
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
    Fault("nan", "One value of o_proj is not a number.", "nan", _one("o_proj"), _nan, (f"{LAYER}.self_attn",)),
)
