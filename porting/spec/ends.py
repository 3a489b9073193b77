"""The two ends of a model: from token ids to the first layer, from the last layer to logits."""

from __future__ import annotations

import torch

from ...store.errors import InputError
from .architecture import Embedding, Head, Number, Positions
from .expressions import Expressions
from .feed_forward import is_linear
from .norms import analyse_norm, is_norm
from .observation import Call, Observation, source_line
from .sources import Sources
from .wiring import Summand, explain, same

_FACTORS = ("config.embedding_multiplier", "config.hidden_size ** 0.5")
_SCALES = ("config.logit_scale", "1 / config.logits_scaling")
_SOFTCAPS = ("config.final_logit_softcapping",)


def outside_of_layers(seen: Observation, layers: str) -> list[Call]:
    """Calls of leaf modules that are not part of a layer, in order."""
    return [c for c in seen.calls if not c.path.startswith(f"{layers}.") and not list(c.module.children())]


def analyse_embedding(seen: Observation, layers: str, numbers: Expressions, sources: Sources) -> Embedding:
    """Explain the first layer's input.

    Raises:
        InputError: it is no sum of a scaled embedding and learned positions.
    """
    first = seen.call(f"{layers}.0").input
    tables = [c for c in outside_of_layers(seen, layers) if isinstance(c.module, torch.nn.Embedding) and c.outputs]
    if not tables:
        raise InputError(f"unsupported: {type(seen.model).__name__} has no embedding table")
    words = tables[0]
    plain = torch.nn.functional.embedding(seen.tokens, words.module.weight)
    known = {"words": plain} | {c.path: c.output.expand_as(plain) for c in tables[1:]}
    summands = explain(first, known)
    line = source_line(seen.model.get_submodule(layers.rpartition(".")[0]), "embeds")
    if summands is None:
        raise InputError(f"unsupported: the first layer's input ({line}) is no sum of embeddings")
    sources.measured("embedding.module", "the first layer's input as a sum of embeddings", line)
    factor = None
    positions = None
    for summand in summands:
        if summand.name == "words":
            factor = _factor(summand, numbers, sources, line)
        elif summand.factor == 1.0 and positions is None:
            call = next(c for c in tables if c.path == summand.name)
            positions = _positions(call, seen, numbers, sources)
        else:
            raise InputError(f"unsupported: {summand.name} enters the first layer ({line}) scaled, or with others")
    rounded = factor is not None and factor.expression.endswith("** 0.5")
    in_module = factor is not None and not same(words.output, plain)
    return Embedding(words.path, factor, rounded, in_module, positions)


def _factor(summand: Summand, numbers: Expressions, sources: Sources, line: str) -> Number | None:
    if summand.factor == 1.0:
        return None
    found = numbers.find(summand.factor, _FACTORS)
    if found is None:
        raise InputError(f"unsupported: embeddings times {summand.factor:.6g} ({line}), which no key gives")
    sources.number("embedding.factor", found, line)
    return found


def _positions(call: Call, seen: Observation, numbers: Expressions, sources: Sources) -> Positions:
    """The offset with which a table of positions is read."""
    table, length = call.module.weight, seen.tokens.shape[1]
    found = call.output.reshape(-1, length, table.shape[1])[0]
    for offset in range(table.shape[0] - length + 1):
        if same(table[offset : offset + length], found):
            line = source_line(call.module, "forward")
            sources.measured("embedding.positions", "rows of the table that were read", line)
            rows = numbers.find(
                table.shape[0], ("config.max_position_embeddings", f"config.max_position_embeddings + {offset}")
            )
            if rows is None:
                raise InputError(f"unsupported: {table.shape[0]} learned positions, which no configuration key gives")
            return Positions(call.path, offset, rows)
    raise InputError(f"unsupported: {call.path} is not read at consecutive positions")


def analyse_head(seen: Observation, layers: str, embedding: Embedding, numbers: Expressions, sources: Sources) -> Head:
    """Explain the logits.

    Raises:
        InputError: they are no projection of the normed output of the last layer.
    """
    n_layers = len(seen.model.get_submodule(layers))
    last = seen.call(f"{layers}.{n_layers - 1}")
    after = [c for c in outside_of_layers(seen, layers) if c.order > last.order and c.outputs]
    norms = [c for c in after if is_norm(c.module)]
    heads = [c for c in after if is_linear(c.module)]
    if len(norms) != 1 or len(heads) != 1:
        raise InputError(
            f"unsupported: {len(norms)} norms and {len(heads)} projections after the layers of "
            f"{type(seen.model).__name__}"
        )
    (norm,), (head,) = norms, heads
    if not same(norm.input.reshape(last.output.shape), last.output) or not same(head.input, norm.output):
        raise InputError(f"unsupported: an operation between the last layer, {norm.path} and {head.path}")
    described = analyse_norm(norm.module, (norm.input.shape[-1],), numbers, sources, "head.norm", norm.path)
    scale, softcap = _after_head(seen, head, numbers, sources)
    tied = head.module.weight.data_ptr() == seen.model.get_submodule(embedding.module).weight.data_ptr()
    sources.add("head.tied", "config: tie_word_embeddings")
    sources.add("head.bias", f"checkpoint: {head.path}.bias")
    sources.add("head.module", source_line(seen.model, "lm_head"))
    bias = getattr(head.module, "bias", None) is not None
    return Head(norm.path, described, head.path, bias, tied, scale, softcap)


def _after_head(
    seen: Observation, head: Call, numbers: Expressions, sources: Sources
) -> tuple[Number | None, Number | None]:
    before, after = head.output.double(), seen.logits.double()
    line = source_line(seen.model, "logits = ")
    factor = float((before * after).sum() / (before * before).sum())
    if same(factor * before, after):
        return _scale(factor, numbers, sources, line), None
    for expression in _SOFTCAPS:
        cap = getattr(numbers.small, expression.removeprefix("config."), None)
        if cap is None:
            continue
        inner = cap * torch.atanh((after / cap).clamp(-0.999999, 0.999999))
        small = after.abs() < 0.9 * cap
        factor = float((before[small] * inner[small]).sum() / (before[small] ** 2).sum())
        if same(cap * torch.tanh(factor * before / cap), after):
            softcap = numbers.number(expression)
            sources.number("head.softcap", softcap, line)
            return _scale(factor, numbers, sources, line), softcap
    raise InputError(f"unsupported: an operation on logits ({line}) that is no factor and no tanh")


def _scale(factor: float, numbers: Expressions, sources: Sources, line: str) -> Number | None:
    if abs(factor - 1) < 1e-5:
        return None
    found = numbers.find(factor, _SCALES)
    if found is None:
        raise InputError(f"unsupported: logits times {factor:.6g} ({line}), which no configuration key gives")
    sources.number("head.scale", found, line)
    return found
