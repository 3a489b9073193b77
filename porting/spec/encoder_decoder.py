"""From the configuration of an encoder-decoder to its architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...capture.packed import packing_of
from ...store.errors import InputError
from .document import leaves, without_cases
from .encoder_decoder_facts import EncoderDecoder, Projection
from .expressions import Expressions
from .feed_forward import is_linear
from .hostile import decoder_inputs, hostile_model, tokens_for
from .observation import Observation, observe, source_line
from .sources import Sources
from .stacks import StackAnalysis, StackFound
from .wiring import explain, same

_FACTORS = ("config.d_model ** -0.5", "config.hidden_size ** -0.5")


@torch.no_grad()
def analyse_encoder_decoder(config: Any) -> EncoderDecoder:
    """Analyse a configuration.

    Its model is made small (`hostile`), runs once on tokens without padding, and every step of it is explained.

    Raises:
        InputError: the model cannot be built, or does something that is not understood: the message begins with
            `unsupported:` and names it.
    """
    if packing_of(config):
        raise InputError(f"unsupported: packed weights in encoder-decoders ({config.model_type}) have no block yet")
    model = hostile_model(config)
    small = model.config
    source, target = tokens_for(small), decoder_inputs(small)["decoder_input_ids"]
    seen = observe(model, source, decoder_input_ids=target)
    numbers, sources = Expressions(small, config), Sources()
    paths = [_path_of(model, part) for part in (model.get_encoder(), model.get_decoder())]
    encoder = StackAnalysis(seen, paths[0], numbers, sources, "encoder").run(source, None)
    memory = seen.call(paths[0]).output
    decoder = StackAnalysis(seen, paths[1], numbers, sources, "decoder").run(target, memory)
    for stack, mask in ((encoder.stack, "full"), (decoder.stack, "causal")):
        if stack.attention.mask[0].kind != mask:
            raise InputError(f"unsupported: self-attention of {stack.class_name} whose mask is not {mask}")
    if encoder.stack.embedding != decoder.stack.embedding:
        raise InputError(f"unsupported: {type(model).__name__} has an embedding for each of encoder and decoder")
    architecture = EncoderDecoder(
        model_type=config.model_type,
        class_name=type(model).__name__,
        config_class=type(config).__name__,
        module_name=type(model).__module__,
        hidden=numbers.number("config.hidden_size"),
        vocabulary=numbers.number("config.vocab_size"),
        encoder=encoder.stack,
        decoder=decoder.stack,
        head=_head(seen, decoder, numbers, sources),
    )
    _check_claims(seen, architecture, encoder.claims | decoder.claims)
    _add_keys(sources, seen, architecture)
    return replace(architecture, sources=sources.entries())


def _path_of(model: torch.nn.Module, part: torch.nn.Module) -> str:
    return str(next(path for path, module in model.named_modules() if module is part))


def _head(seen: Observation, decoder: StackFound, numbers: Expressions, sources: Sources) -> Projection:
    """Explain the logits.

    Raises:
        InputError: they are no projection of the decoder's output, or of a multiple of it.
    """
    whole = seen.call(decoder.stack.path)
    line = source_line(seen.model, "lm_head(")
    heads = [c for c in seen.calls if c.order > whole.order and is_linear(c.module) and c.path.count(".") == 0]
    if len(heads) != 1 or not same(heads[0].output, seen.logits):
        raise InputError(f"unsupported: logits of {type(seen.model).__name__} ({line}) that are not one projection's")
    (head,) = heads
    summands = explain(head.input, {"decoder": whole.output})
    if summands is None or len(summands) != 1:
        raise InputError(f"unsupported: an operation between the decoder and {head.path} ({line})")
    factor = None
    if summands[0].factor != 1.0:
        factor = numbers.find(summands[0].factor, _FACTORS)
        if factor is None:
            raise InputError(f"unsupported: {head.path} is given {summands[0].factor:.6g} times the decoder's output")
        sources.number("head.factor", factor, source_line(seen.model, "sequence_output *"))
    table = seen.model.get_submodule(decoder.stack.embedding)
    sources.add("head.module", line)
    sources.add("head.tied", "config: tie_word_embeddings")
    sources.add("head.bias", f"checkpoint: {head.path}.bias")
    tied = head.module.weight.data_ptr() == table.weight.data_ptr()
    return Projection(head.path, getattr(head.module, "bias", None) is not None, tied, factor)


def _check_claims(seen: Observation, architecture: EncoderDecoder, claimed: frozenset[str]) -> None:
    """Every parameter of the small model is part of the description."""
    head = {f"{architecture.head.module}.{kind}" for kind in ("weight", "bias")}
    for name, _ in seen.model.named_parameters():
        if name not in claimed | head:
            raise InputError(f"unsupported: parameter {name} of {architecture.class_name} has no place in the port")


def _add_keys(sources: Sources, seen: Observation, architecture: EncoderDecoder) -> None:
    """Add the class of the whole, and the configuration keys of everything that the port reads from there."""
    for field in ("model_type", "config_class"):
        sources.add(field, "config: model_type")
    for field in ("class_name", "module_name"):
        sources.add(field, source_line(seen.model, f"class {type(seen.model).__name__}"))
    for field, value in leaves(architecture):
        expression = str(value).partition(" = ")[0]
        if "config." in expression:
            sources.add(without_cases(field), f"config: {expression.replace('config.', '')}")
