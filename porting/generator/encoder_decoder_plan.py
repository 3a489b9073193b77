"""What the port of an encoder-decoder contains: two stacks, each an application of its own, and what joins them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Attention, Layer, Norm
from ..spec.document import numbers_in
from ..spec.encoder_decoder_facts import EncoderDecoder, Stack
from .feed_forward_plan import block_plan
from .layer_plan import LayerValues
from .norm_plan import norm_constructor, plan_of_norms

_HIDDEN = "config.hidden_size"
_REQUIRED = ("hidden_size", "pad_token_id", "vocab_size")
#: What the blocks of a layer are called in the port.
BLOCKS = {"attention": "self_attn", "cross_attention": "cross_attn", "feed_forward": "mlp"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def encoder_decoder_plan(spec: EncoderDecoder, stem: str, release: str) -> dict[str, Any]:
    """Everything that the templates print.

    Args:
        spec: the architecture.
        stem: the model's name in class names.
        release: of the SDK, as the file's first line says it.

    Raises:
        InputError: the architecture needs a block that does not exist.
    """
    attention = _attention(spec)
    return {
        "spec": spec,
        "stem": stem,
        "facts_file": "architecture.json",
        "release": release,
        "norm": plan_of_norms(_norms(spec)),
        "attention": attention,
        "positions": spec.encoder.positions or spec.decoder.positions,
        "ff": _feed_forward(spec),
        "encoder": _stack(spec.encoder, stem),
        "decoder": _stack(spec.decoder, stem),
        "head": spec.head,
        "required": sorted(set(_REQUIRED) | set(re.findall(r"config\.(\w+)", " ".join(numbers_in(spec))))),
        "outer": {name: list(_outer(spec, name, stack)) for name, stack in spec.stacks},
        "inner": {name: list(_inner(stack)) for name, stack in spec.stacks},
    }


def _norms(spec: EncoderDecoder) -> Iterator[Norm]:
    for _, stack in spec.stacks:
        yield from (named.norm for named in stack.layer.norms)
        yield stack.norm


def _attention(spec: EncoderDecoder) -> dict[str, Any]:
    """What all attentions have in common; the port has one base class for them."""
    found = [a for _, stack in spec.stacks for a in (stack.attention, stack.cross) if a is not None]
    first = found[0]
    if any(_of_base(attention) != _of_base(first) for attention in found):
        raise InputError("unsupported: attentions of encoder and decoder that differ in sizes or biases have no block")
    if first.layout != "separate" or first.transposed or first.softcap is not None or first.clip is not None:
        raise InputError("unsupported: fused, transposed or bounded attention in encoder-decoders has no block")
    return {
        "class_name": first.class_name,
        "heads": first.heads.expression,
        "head_dim": first.head_dim.expression,
        "biases": list(zip(PROJECTIONS, first.qkv_bias, strict=True)),
        "output_bias": first.output_bias,
        "scale": "" if first.scale.expression == "1.0" else first.scale.expression,
    }


def _of_base(attention: Attention) -> object:
    sizes = (attention.heads, attention.kv_heads == attention.heads, attention.head_dim)
    return sizes, attention.qkv_bias, attention.output_bias, attention.scale


def _feed_forward(spec: EncoderDecoder) -> dict[str, Any]:
    """The block of both stacks."""
    block, other = spec.encoder.feed_forward, spec.decoder.feed_forward
    if (block.kind, block.activation, block.intermediate, block.up_bias, block.down_bias) != (
        other.kind,
        other.activation,
        other.intermediate,
        other.up_bias,
        other.down_bias,
    ):
        raise InputError("unsupported: encoder and decoder with different feed-forward blocks have no block yet")
    if block.layout != "separate" or block.transposed:
        raise InputError("unsupported: fused or transposed feed-forward blocks in encoder-decoders have no block yet")
    names = [block.gate, block.up] if block.kind == "gated" else [block.up]
    return {"class_suffix": "MLP", "given_width": False, "tuple": False, **block_plan(block, names, block.down)}


def port_names(layer: Layer) -> dict[str, str]:
    """What the modules of a layer are called in the port: blocks by their role, norms by the block they belong to."""
    names = {node.name: BLOCKS[node.role] for node in layer.nodes if node.role in BLOCKS}
    for node in layer.nodes:
        if node.role != "norm":
            continue
        given = [other.name for other in layer.nodes if any(term.node == node.name for term in other.terms)]
        owner = next((names[name] for name in given if name in names), "")
        if not owner or f"{owner}_norm" in names.values():
            raise InputError(f"unsupported: the norm {node.name}, which stands before no block, has no place yet")
        names[node.name] = f"{owner}_norm"
    return names


def _stack(stack: Stack, stem: str) -> dict[str, Any]:
    names = port_names(stack.layer)
    norms = {named.name: named.norm for named in stack.layer.norms}
    kind = "Decoder" if stack.cross is not None else "Encoder"
    made = {
        "attention": f"Neuron{stem}{'SelfAttention' if stack.cross is not None else 'Attention'}(config)",
        "cross_attention": f"Neuron{stem}CrossAttention(config)",
        "feed_forward": f"Neuron{stem}MLP(config)",
    }
    modules = [
        (
            names[node.name],
            norm_constructor(norms[node.name], _HIDDEN, stem) if node.role == "norm" else made[node.role],
        )
        for node in stack.layer.nodes
    ]
    return {
        "kind": kind,
        "class_name": stack.layer.class_name,
        "modules": modules,
        "forward": list(_forward(stack, names)),
        "n_layers": stack.n_layers.expression,
        "norm": norm_constructor(stack.norm, _HIDDEN, stem),
        "positions": stack.positions,
        "own_positions": stack.positions is not None and not stack.positions.shared,
        "shared_positions": stack.positions is not None and stack.positions.shared,
        "path": stack.path,
        "layers": stack.layer.path,
    }


def _forward(stack: Stack, names: dict[str, str]) -> Iterator[str]:
    """Statements that compute a layer, one per module and one per sum."""
    values = LayerValues()
    for node in stack.layer.nodes:
        yield from values.named_sum(node.terms)
        given, module = values.text(node.terms), names[node.name]
        values.names[node.name] = f"after_{module}"
        if node.role == "cross_attention":
            yield f"after_{module} = self.{module}({given}, source_mask, *cross_cache)"
        elif node.role == "attention" and stack.cross is not None:
            yield f"after_{module}, *self_cache = self.{module}({given}, position_ids, mask, bias, *self_cache)"
        elif node.role == "attention":
            yield f"after_{module} = self.{module}({given}, mask, bias)"
        else:
            yield f"after_{module} = self.{module}({given})"
    yield f"hidden_states = {values.text(stack.layer.output)}"


def _outer(spec: EncoderDecoder, name: str, stack: Stack) -> Iterator[tuple[str, str]]:
    """Modules around the layers: what the checkpoint calls them, and the port."""
    yield stack.embedding, "embed_tokens"
    yield stack.norm_module, "norm"
    if stack.positions is not None and stack.positions.shared:
        yield f"{stack.layer.path}.0.{stack.attention.module}.{stack.positions.module}", "relative_bias.table"
    if name == "decoder" and not spec.head.tied:
        yield spec.head.module, "lm_head"


def _inner(stack: Stack) -> Iterator[tuple[str, str]]:
    """Modules inside a layer."""
    names = port_names(stack.layer)
    for node in stack.layer.nodes:
        if node.role == "norm":
            yield node.name, names[node.name]
    for attention, block in ((stack.attention, "self_attn"), (stack.cross, "cross_attn")):
        if attention is not None:
            pairs = zip((*attention.projections, attention.output), (*PROJECTIONS, "o_proj"), strict=True)
            yield from ((f"{attention.module}.{old}", f"{block}.{new}") for old, new in pairs)
    if stack.positions is not None and not stack.positions.shared:
        yield f"{stack.attention.module}.{stack.positions.module}", "relative_bias.table"
    feed_forward = stack.feed_forward
    for name in dict.fromkeys(n for n in (feed_forward.gate, feed_forward.up, feed_forward.down) if n):
        yield f"{feed_forward.module}.{name}", f"mlp.{name}"
