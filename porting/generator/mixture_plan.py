"""Mixtures of experts in a port: the library's module, its router replaced where it cannot route as the model does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...store.errors import InputError
from ..spec.architecture import MixtureOfExperts, Router

#: Activations that the library's experts have.
_ACTIVATIONS = ("gelu", "leaky_relu", "relu", "sigmoid", "silu", "tanh")


def mixture_plan(mixture: MixtureOfExperts, stem: str) -> dict[str, Any]:
    """What the templates print of a mixture of experts.

    Raises:
        InputError: the library's experts do not have the activation.
    """
    experts, router = mixture.experts, mixture.router
    if experts.formula == "gated" and experts.activation_name not in _ACTIVATIONS:
        raise InputError(f"unsupported: the library's experts do not have the activation {experts.activation_name}")
    custom = _custom(router)
    if router.after_top_k and (custom or router.scores != "softmax"):
        raise InputError(f"unsupported: {router.scores} over the chosen experts only has no block yet")
    wrapped = bool(custom) or mixture.shared is not None or router.scale is not None
    arguments = _arguments(mixture, custom)
    shared = mixture.shared
    return {
        "class_name": mixture.class_name,
        "router": custom,
        "router_summary": _summary(router),
        "router_bias": router.bias,
        "router_init": list(_router_init(router)),
        "n_experts": router.n_experts.expression,
        "top_k": router.top_k.expression,
        "scores": router.scores,
        "correction": router.correction,
        "groups": router.groups is not None,
        "group_score": router.group_score,
        "config": list(_config(mixture, custom)),
        "wrapped": wrapped,
        "arguments": arguments,
        "scale": "" if router.scale is None else router.scale.expression,
        "shared": None
        if shared is None
        else {
            "name": shared.block.module,
            "class_suffix": "SharedExpert",
            "intermediate": shared.block.intermediate.expression,
            "gate": shared.gate,
        },
        "constructor": f"Neuron{stem}MoE(config)"
        if wrapped
        else f"initialize_moe_module(config=experts_config(config){arguments})",
    }


def target_of(mixture: MixtureOfExperts) -> str:
    """Where the library's module is inside a layer."""
    wrapped = bool(_custom(mixture.router)) or mixture.shared is not None or mixture.router.scale is not None
    return f"{mixture.module}.moe" if wrapped else mixture.module


def _custom(router: Router) -> str:
    """The kind of router that the library lacks, empty where its own does."""
    if router.scores == "sparsemixer":
        return "sparsemixer"
    return "ranked" if router.correction or router.groups is not None else ""


def _summary(router: Router) -> str:
    if router.scores == "sparsemixer":
        return "The two best experts, each weighted by a softmax over its near ties (Liu et al., 2024)."
    words = [f"The best experts by their {router.scores}"]
    words += ["plus a correction that does not weigh"] if router.correction else []
    words += ["among the best groups"] if router.groups is not None else []
    return f"{', '.join(words)}."


def _router_init(router: Router) -> Iterator[str]:
    if router.jitter is not None:
        yield f"self.jitter = {router.jitter.expression}"
    if router.correction:
        size = router.n_experts.expression
        yield f'self.register_buffer("{router.correction}", torch.zeros({size}))'
    if router.groups is not None and router.open_groups is not None:
        yield f"self.n_groups = {router.groups.expression}"
        yield f"self.n_open_groups = {router.open_groups.expression}"


def _arguments(mixture: MixtureOfExperts, custom: str) -> str:
    given = []
    if mixture.router.after_top_k and not custom:
        given.append("apply_act_fn_over_topk=True")
    if mixture.router.bias:
        given.append("router_bias=True")
    if mixture.experts.bias:
        given.append("experts_bias=True")
    return "".join(f", {argument}" for argument in given)


def _config(mixture: MixtureOfExperts, custom: str) -> Iterator[tuple[str, str]]:
    router, experts = mixture.router, mixture.experts
    for name, expression in (
        ("num_local_experts", router.n_experts.expression),
        ("num_experts_per_tok", router.top_k.expression),
        ("intermediate_size", experts.intermediate.expression),
    ):
        if expression != f"config.{name}":
            yield name, expression
    yield "n_shared_experts", "0"
    if experts.formula == "clamped":
        yield "hidden_act", '"sigmoid"'
        for name, value in (
            ("glu_type", '"swiglu"'),
            ("hidden_act_scaling_factor", "1.702"),
            ("hidden_act_bias", "1"),
            ("gate_clamp_upper_limit", "7.0"),
            ("up_clamp_upper_limit", "7.0"),
            ("up_clamp_lower_limit", "-7.0"),
        ):
            yield f"neuron_config.{name}", value
    elif experts.activation != "config.hidden_act":
        yield "hidden_act", experts.activation
    yield "neuron_config.router_config.dtype", "torch.float32"
    if not custom:
        yield "neuron_config.router_config.act_fn", f'"{router.scores}"'
    normalized = router.normalized and custom != "sparsemixer"
    yield "neuron_config.normalize_top_k_affinities", str(normalized)
