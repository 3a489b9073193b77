"""The feed-forward blocks of a port: the library's where it has one, else a block of its own."""

from __future__ import annotations

from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture, FeedForward
from .mixture_plan import mixture_plan

#: Activations for which the library's own block has kernels.
_NATIVE_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def feed_forward_plan(spec: Architecture, stem: str) -> dict[str, Any]:
    """What the layers' blocks are.

    Returns:
        For the templates: `classes` to define, `mixture` of experts (None without), `constructor` (lines that make a
        layer's block), the attribute's `name`, `per_layer` (whether layers differ), `first` (what picks the output out
        of what the block returns), `extra` (further arguments of a call) and `native` (the library's MLP is used).
    """
    dense = [case.block for case in spec.feed_forward if case.block is not None]
    mixtures = [case.experts for case in spec.feed_forward if case.experts is not None]
    if len(dense) > 1 or len(mixtures) > 1:
        raise InputError("unsupported: layers with different dense blocks, or different experts, have no block yet")
    mixture = mixture_plan(mixtures[0], stem) if mixtures else None
    classes, made = [], {}
    native = False
    if dense:
        described = _dense(dense[0])
        native = described["native"]
        described["tuple"] = bool(mixture) and not native
        if not native:
            classes.append(described)
        made[False] = "NeuronLlamaMLP(config)" if native else f"Neuron{stem}MLP(config)"
    if mixture is not None:
        made[True] = mixture["constructor"]
        if mixtures[0].shared is not None:
            classes.append(_shared(mixtures[0].shared.block))
    name = (dense[0].module or "mlp") if dense else mixtures[0].module
    return {
        "classes": classes,
        "mixture": mixture,
        "name": name,
        "constructor": _constructor(spec, name, made),
        "per_layer": len(spec.feed_forward) > 1,
        "first": "[0]" if native or mixture else "",
        "extra": ', kwargs.get("padding_mask")' if mixture and not dense else "",
        "native": native,
    }


def _constructor(spec: Architecture, name: str, made: dict[bool, str]) -> list[str]:
    if len(spec.feed_forward) == 1:
        return [f"self.{name} = {next(iter(made.values()))}"]
    first, second = spec.feed_forward
    return [
        f"if {first.condition}:",
        f"    self.{name} = {made[first.experts is not None]}",
        "else:",
        f"    self.{name} = {made[second.experts is not None]}",
    ]


def _dense(block: FeedForward) -> dict[str, Any]:
    gated = block.kind == "gated"
    native = gated and block.activation_name in _NATIVE_ACTIVATIONS and block.up_bias == block.down_bias
    names = [block.gate, block.up] if gated else [block.up]
    if block.layout != "separate" or native:
        names = ["gate_proj", "up_proj"]
    down = "down_proj" if native or gated else block.down
    return {
        "native": native,
        "class_suffix": "MLP",
        "given_width": False,
        "tuple": False,
        **block_plan(block, names, down),
    }


def _shared(block: FeedForward) -> dict[str, Any]:
    if block.layout != "separate":
        raise InputError("unsupported: a shared expert with a fused projection has no block yet")
    names = [block.gate, block.up] if block.kind == "gated" else [block.up]
    described = {"native": False, "class_suffix": "SharedExpert", "given_width": True, "tuple": False}
    return {**described, **block_plan(block, names, block.down)}


def block_plan(block: FeedForward, names: list[str], down: str) -> dict[str, Any]:
    """What the template of a block prints: names of its projections, its activation, its width, its biases."""
    gated = block.kind == "gated"
    formula = f"{down}(act({names[0]}(x)) * {names[1]}(x))" if gated else f"{down}(act({names[0]}(x)))"
    return {
        "description": f"{block.class_name}: {formula}." if block.module else f"{formula}.",
        "activation": block.activation,
        "intermediate": block.intermediate.expression,
        "ups": names,
        "down": down,
        "up_bias": block.up_bias,
        "down_bias": block.down_bias,
        "gated": gated,
    }
