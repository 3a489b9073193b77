"""Bugs of embeddings, norms, projections and logits: wrong weights, gains, biases, factors and precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from .fault import Fault, Severity
from .planting import (
    LAYER,
    ONE_LAYER,
    attention_part,
    epsilon_name,
    modules,
    norms,
    on_output,
    quantised,
    replaced_shards,
    rms_norm,
    set_weight,
    times,
)

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


QKV = tuple(f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
SAME_LAYER_QKV = tuple(f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))

WEIGHT_FAULTS = (
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
        ("model.layers.0", "model.layers.0.input_layernorm"),
        _no_normalizer,
        ("model.embed_tokens", "model.layers.0.input_layernorm"),
        needs="embedding_scale",
    ),
    Fault(
        "embedding-shard",
        "Rank 0's part of the vocabulary is embedded, the rest is zero: the all-reduce is missing.",
        "embedding shard",
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
        "vocabulary order",
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
        "another norm's gain",
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
        "another norm's gain",
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
        {0.0: "missing bias", 2.0: "doubled bias", 1.1: "wrong bias", 1.02: "wrong bias"},
        QKV,
        _qkv_bias,
        SAME_LAYER_QKV,
        needs="qkv_bias",
        severities=(0.0, 2.0, 1.1, 1.02),
    ),
    Fault(
        "value-bias-missing",
        "The bias of V is missing.",
        "missing bias",
        ("model.layers.*.self_attn.v_proj",),
        _value_bias,
        needs="qkv_bias",
    ),
    Fault(
        "output-bias-doubled",
        "Every rank adds the bias of o_proj.",
        "doubled bias",
        ("model.layers.*.self_attn.o_proj",),
        _bias_on_every_rank,
        ("model.layers.{}.self_attn",),
        needs="qkv_bias",
    ),
    Fault(
        "projection-scale",
        "o_proj of one layer is multiplied by a factor.",
        "multiplier",
        attention_part("o_proj"),
        _projection_scale,
        (f"{LAYER}.self_attn",),
        severities=(1.5, 1.1, 1.02, 1.004),
    ),
    Fault(
        "weight-transposed",
        "A square weight is transposed.",
        "transposed weight",
        attention_part("q_proj"),
        _transposed("q_proj"),
        needs="square_q",
    ),
    Fault(
        "weight-transposed-output",
        "A square o_proj is transposed.",
        "transposed weight",
        attention_part("o_proj"),
        _transposed("o_proj"),
        (f"{LAYER}.self_attn",),
        needs="square_q",
    ),
    Fault(
        "weight-permuted", "The rows of k_proj are permuted.", "permuted weight", attention_part("k_proj"), _permuted
    ),
    Fault(
        "weight-of-next-layer",
        "v_proj has the weight of the next layer's.",
        "another weight",
        attention_part("v_proj"),
        _weight_of_next_layer("v_proj"),
    ),
    Fault(
        "layers-swapped",
        "Two layers have each other's weights.",
        "another norm's gain",
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
)
