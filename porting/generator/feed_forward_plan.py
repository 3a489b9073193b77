"""The feed-forward blocks of a port: the library's where it has one, else a block of its own."""

from __future__ import annotations

from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture, FeedForward

#: Activations for which the library's own block has kernels.
_NATIVE_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def feed_forward_plans(spec: Architecture) -> list[dict[str, Any]]:
    if len(spec.feed_forward) != 1:
        raise InputError("unsupported: layers with different feed-forward blocks have no block yet")
    return [_feed_forward(case.block) for case in spec.feed_forward]


def _feed_forward(block: FeedForward) -> dict[str, Any]:
    gated = block.kind == "gated"
    native = gated and block.activation_name in _NATIVE_ACTIVATIONS and block.up_bias == block.down_bias
    names = [block.gate, block.up] if gated else [block.up]
    if block.layout != "separate" or native:
        names = ["gate_proj", "up_proj"]
    down = "down_proj" if native or gated else block.down
    formula = f"{down}(act({names[0]}(x)) * {names[1]}(x))" if gated else f"{down}(act({names[0]}(x)))"
    return {
        "native": native,
        "define": not native,
        "class_suffix": "MLP",
        "description": f"{block.class_name}: {formula}." if block.module else f"{formula}.",
        "activation": block.activation,
        "intermediate": block.intermediate.expression,
        "ups": names,
        "down": down,
        "up_bias": block.up_bias,
        "down_bias": block.down_bias,
        "gated": gated,
        "name": block.module or "mlp",
    }
