"""Where a wrong fact shows first: the modules of a model whose outputs it changes before any other's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..spec.architecture import Architecture, FeedForward, MixtureOfExperts

_LAYER = "<layer>"
#: Facts of a rotary embedding that its tables hold; the others show in what attention makes of them.
_IN_TABLES = ("kind", "theta", "factor", "dim", "scaling")


def shows_at(spec: Architecture, field: str, module: str) -> bool:
    """Whether a module is one where a wrong fact shows first.

    Args:
        spec: the right architecture.
        field: dotted path of the fact, as `mutants` gives it.
        module: path in the model, in any layer.
    """
    return any(re.fullmatch(_pattern(spec, path), module) for path in first_modules(spec, field))


def first_modules(spec: Architecture, field: str) -> list[str]:
    """Modules whose output is the first that a fact changes; `<layer>` stands for a layer, `X.*` for all inside X.

    Args:
        spec: the architecture.
        field: dotted path of the fact.
    """
    part, *rest = field.split(".")
    inside = {"embedding": _embedding, "layer": _layer, "attention": _attention, "feed_forward": _feed_forward}
    return list(inside.get(part, _head)(spec, rest))


def _pattern(spec: Architecture, path: str) -> str:
    layer = re.escape(f"{spec.layer.path}.") + r"\d+"
    return re.escape(path).replace(re.escape(_LAYER), layer).replace(r"\.\*", r"\..*")


def _embedding(spec: Architecture, field: Sequence[str]) -> Iterator[str]:
    if field[0] == "positions" and spec.embedding.positions is not None:
        yield spec.embedding.positions.module
    elif spec.embedding.in_module:
        yield spec.embedding.module
    else:
        first = next(node for node in spec.layer.nodes if any(term.node == "hidden_states" for term in node.terms))
        yield f"{_LAYER}.{first.name}"


def _layer(spec: Architecture, field: Sequence[str]) -> Iterator[str]:
    if field[0] == "output":
        yield _LAYER
        return
    name = field[1]
    yield f"{_LAYER}.{name}"
    yield f"{_LAYER}.{name}.*"
    roles = {node.name: node.role for node in spec.layer.nodes}
    if roles.get(name) == "feed_forward":
        for case in spec.feed_forward:
            if case.block is not None and not case.block.module:
                yield from (f"{_LAYER}.{projection}" for projection in (case.block.gate, case.block.up))


def _attention(spec: Architecture, field: Sequence[str]) -> Iterator[str]:
    attention = spec.attention
    module = f"{_LAYER}.{attention.module}"
    norm, latent = attention.query_key_norm, attention.latent
    if field[0] == "query_key_norm" and norm is not None:
        for name in (norm.query, norm.key):
            yield from (f"{module}.{name}", f"{module}.{name}.*")
    elif field[0] == "latent" and latent is not None:
        yield from (f"{module}.{name}" for name in (latent.query_norm, latent.norm_module) if name)
    elif field[0] == "layout":
        yield from (f"{module}.{name}" for name in attention.projections)
    elif field[0] == "rotary" and field[-1] in _IN_TABLES:
        base = spec.layer.path.rpartition(".")[0]
        yield from (f"{base}.rotary_emb", f"{base}.rotary_emb_local", f"{module}.rotary_emb")
    yield from (f"{module}.{attention.output}", module)


def _feed_forward(spec: Architecture, field: Sequence[str]) -> Iterator[str]:
    case = spec.feed_forward[int(field[0])]
    if case.block is not None:
        yield from _block(f"{_LAYER}.{case.block.module}".rstrip("."), case.block)
    elif case.experts is not None:
        yield from _experts(case.experts, field[2:])


def _block(module: str, block: FeedForward) -> Iterator[str]:
    """Activation and order of halves show behind the activation."""
    if block.activation_module:
        yield f"{module}.{block.activation_module}"
    yield f"{module}.{block.down}"
    if module != _LAYER:
        yield module


def _experts(mixture: MixtureOfExperts, field: Sequence[str]) -> Iterator[str]:
    module = f"{_LAYER}.{mixture.module}"
    if field[0] == "router":
        yield f"{module}.{mixture.router.module}"
    if field[0] == "shared" and mixture.shared is not None:
        yield from _block(f"{module}.{mixture.shared.block.module}", mixture.shared.block)
    yield module


def _head(spec: Architecture, field: Sequence[str]) -> Iterator[str]:
    if field[0] == "norm":
        yield spec.head.norm_module
    else:
        yield from (spec.head.module, "(root)")
