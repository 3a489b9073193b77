"""Which modules of an encoder-decoder's port hold the values of which modules of its model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from ..generator.encoder_decoder_plan import PROJECTIONS, port_names
from ..spec.architecture import Attention
from ..spec.encoder_decoder_facts import EncoderDecoder, Stack
from ..spec.expressions import Expressions
from .components import Entry, mapping_of

_TABLE = "one table that encoder and decoder look up, each in the port's own: compared by what their layers make of it"
_BIAS = "biases on scores: the port adds them inside its attention, which is compared"
_SUM = "a sum that the port computes inside its layer, which is compared"
_RETURNED = "what the module after it, or the model, hands on"
_PADDED = "the port pads heads, and widths, to a multiple of the ranks"


def encoder_decoder_mapping(
    spec: EncoderDecoder, config: Any, tp: int, recorded: Collection[tuple[str, str]]
) -> dict[str, Any]:
    """A component mapping for a comparison of the model with its port.

    Args:
        spec: the architecture.
        config: of the model that was run.
        tp: number of ranks.
        recorded: module and slot of every site that the reference has.

    Returns:
        The document of a component_mapping.json.
    """
    numbers = Expressions(config, config)
    entries = [entry for name, stack in spec.stacks for entry in _of_stack(name, stack, numbers, tp)]
    entries += _around(spec)
    named = {entry.source.partition("[")[0] for entry in entries if entry.target}
    return mapping_of([*entries, *_left_over(spec, recorded, named)], recorded)


def _around(spec: EncoderDecoder) -> Iterator[Entry]:
    yield Entry("(root)[encoder_last_hidden_state]", "", _RETURNED)
    yield Entry(spec.encoder.embedding, "", _TABLE)
    yield Entry(spec.head.module, "decoder.lm_head", "the projection to logits")
    for name, stack in spec.stacks:
        yield Entry(f"{stack.path}[last_hidden_state]", "encoder" if name == "encoder" else "", _RETURNED)
        yield Entry(stack.norm_module, f"{name}.norm", "the final norm")


def _of_stack(name: str, stack: Stack, numbers: Expressions, tp: int) -> Iterator[Entry]:
    names = port_names(stack.layer)
    block = stack.feed_forward
    width = int(numbers.value(block.intermediate.expression))
    for layer in range(int(numbers.value(stack.n_layers.expression))):
        source, target = f"{stack.layer.path}.{layer}", f"{name}.layers.{layer}"
        yield Entry(source, target, "the layer")
        for node in stack.layer.nodes:
            yield Entry(f"{source}.{node.name}", f"{target}.{names[node.name]}", node.role.replace("_", " "))
        for attention, module in ((stack.attention, "self_attn"), (stack.cross, "cross_attn")):
            if attention is not None:
                inside = f"{source}.{attention.module}"
                yield from _of_attention(attention, inside, f"{target}.{module}", numbers, tp)
        for part in dict.fromkeys(n for n in (block.gate, block.up, block.down) if n):
            ranges = None if part == block.down else _own(width, tp)
            yield Entry(f"{source}.{block.module}.{part}", f"{target}.mlp.{part}", "its projection", ranges)
        if block.activation_module:
            activation = f"{source}.{block.module}.{block.activation_module}"
            yield Entry(activation, f"{target}.mlp.act_fn", "its activation", _own(width, tp))


def _of_attention(attention: Attention, source: str, target: str, numbers: Expressions, tp: int) -> Iterator[Entry]:
    heads, size = (int(numbers.value(number.expression)) for number in (attention.heads, attention.head_dim))
    padded = {"target": [[0, heads * size]]} if heads % tp else None
    for old, new in zip(attention.projections, PROJECTIONS, strict=True):
        reason = _PADDED if padded else "its projection"
        yield Entry(f"{source}.{old}", f"{target}.{new}", reason, padded)
    yield Entry(f"{source}.{attention.output}", f"{target}.o_proj", "its output")


def _own(width: int, tp: int) -> dict[str, list[list[int]]] | None:
    """The features that are the model's, where ranks pad a width."""
    return {"target": [[0, width]]} if math.ceil(width / tp) * tp != width else None


def _left_over(spec: EncoderDecoder, recorded: Collection[tuple[str, str]], named: set[str]) -> Iterator[Entry]:
    """Biases beside the outputs of layers and attentions, and modules that wrap a block and its sum."""
    tables = {stack.positions.module for _, stack in spec.stacks if stack.positions is not None}
    layers = tuple(f"{stack.layer.path}." for _, stack in spec.stacks)
    for module, slot in sorted(recorded):
        if not module.startswith(layers):
            continue
        if module in named and slot not in ("", "0"):
            yield Entry(f"{module}[{slot}]", "", _BIAS)
        elif module.rpartition(".")[2] in tables:
            yield Entry(module, "", _BIAS)
        elif module not in named:
            yield Entry(f"{module}[{slot}]" if slot else module, "", _SUM)
