"""Dense feed-forward blocks: which projection is the gate, and which activation, decided by recomputing the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.activations import ACT2FN

from ...store.errors import InputError
from .architecture import FeedForward, Number
from .expressions import Expressions
from .norms import is_norm
from .observation import Call, Observation, source_line
from .sources import Sources
from .wiring import same

_WIDTHS = (
    "config.intermediate_size",
    "config.ffn_dim",
    "config.ffn_hidden_size",
    "config.n_inner",
    "4 * config.hidden_size",
    "config.moe_intermediate_size",
    "config.shared_expert_intermediate_size",
    "config.moe_intermediate_size * config.n_shared_experts",
    "config.moe_intermediate_size * config.moe_num_shared_experts",
)
_ACTIVATION_KEYS = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "dense_act_fn",
    "feed_forward_proj",
)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module multiplies by a matrix."""
    return type(module).__name__ in ("Linear", "Conv1D") or isinstance(module, torch.nn.Linear)


def analyse_feed_forward(
    seen: Observation, path: str, calls: Sequence[Call], numbers: Expressions, sources: Sources
) -> FeedForward:
    """Explain a block.

    Args:
        seen: the observed model.
        path: the block's module, or the layer's where the projections are the layer's own.
        calls: the calls of its projections, in order.
        numbers: expressions over the configuration.
        sources: receives where fields come from.

    Raises:
        InputError: the output is not what a gated or plain block computes.
    """
    owner = seen.model.get_submodule(path)
    linears = [call for call in calls if is_linear(call.module)]
    where = f"{type(owner).__name__} at {path} ({source_line(owner, 'def forward')})"
    if len(linears) not in (2, 3):
        raise InputError(f"unsupported: {len(linears)} projections in {where}")
    *ups, down = linears
    key, name = activation_of(numbers, where)
    fitting = [
        (gate, up, layout)
        for gate, up, layout, hidden in _candidates(ups, ACT2FN[name])
        if hidden.shape[-1] == down.input.shape[-1] and same(hidden.reshape(down.input.shape), down.input)
    ]
    if len(fitting) != 1:
        raise InputError(f"unsupported: {where} is no gated and no plain block with activation {name}")
    ((gate, up, layout),) = fitting
    width = width_of(numbers, down.input.shape[-1], where)
    kind = "gated" if gate is not None else "plain"
    local = [call.path.removeprefix(f"{path}.") for call in (gate or up, up, down)]
    sources.measured(
        "feed_forward.kind", "output recomputed from the projections", source_line(owner, f"self.{local[2]}(")
    )
    sources.add("feed_forward.activation", f"config: {key}")
    sources.add("feed_forward.up_bias", f"checkpoint: {up.path}.bias")
    sources.add("feed_forward.down_bias", f"checkpoint: {down.path}.bias")
    sources.number("feed_forward.intermediate", width)
    is_layer = seen.calls_of(path) and path.rpartition(".")[2].isdigit()
    return FeedForward(
        module="" if is_layer else path.rpartition(".")[2],
        class_name=type(owner).__name__,
        kind=kind,
        activation=f"config.{key}",
        activation_name=name,
        intermediate=Number(width.expression, width.value),
        gate=local[0] if gate is not None else "",
        up=local[1],
        down=local[2],
        layout=layout,
        up_bias=getattr(up.module, "bias", None) is not None,
        down_bias=getattr(down.module, "bias", None) is not None,
        transposed=type(down.module).__name__ == "Conv1D",
        activation_module=_activation_module(seen, path),
    )


def _activation_module(seen: Observation, path: str) -> str:
    """The module of the block that has no weights and no parts: its activation."""
    for call in seen.children(path):
        empty = not list(call.module.children()) and not list(call.module.parameters())
        if empty and not isinstance(call.module, (torch.nn.Dropout, torch.nn.Identity)) and not is_norm(call.module):
            return str(call.path.removeprefix(f"{path}."))
    return ""


def width_of(numbers: Expressions, measured: int, where: str) -> Number:
    """The configuration's expression of an inner width.

    Raises:
        InputError: there is none.
    """
    width = numbers.find(measured, _WIDTHS)
    if width is None:
        raise InputError(f"unsupported: width {measured} of {where}, which no configuration key gives")
    return width


def activation_of(numbers: Expressions, where: str) -> tuple[str, str]:
    """The configuration key that names the activation, and the name.

    Raises:
        InputError: there is none.
    """
    for key in _ACTIVATION_KEYS:
        name = getattr(numbers.small, key, None)
        if isinstance(name, str) and name in ACT2FN:
            return key, name
    raise InputError(f"unsupported: {where} has an activation that no configuration key names")


def _candidates(ups: Sequence[Call], act: torch.nn.Module) -> Iterator[tuple[Call | None, Call, str, torch.Tensor]]:
    """Gate, other factor, layout, and the product they would give."""
    if len(ups) == 2:
        for gate, up in (ups, reversed(ups)):
            yield gate, up, "separate", act(gate.output) * up.output
        return
    only = ups[0]
    yield None, only, "separate", act(only.output)
    first, second = only.output.chunk(2, -1)
    yield only, only, "gate_first", act(first) * second
    yield only, only, "up_first", act(second) * first


def claims(block: FeedForward) -> tuple[str, ...]:
    """Parameters of a block that its conversion consumes, relative to the block."""
    modules = dict.fromkeys(name for name in (block.gate, block.up, block.down) if name)
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))
