"""Specs that differ from a right one in a single fact: what the parity gate has to notice.

Facts that only show in low precision (`rounding`), names, and sizes whose change cannot even be loaded are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..spec.architecture import Architecture, Number, Term

#: Other values of facts that are one of a few words.
_OTHERS: dict[tuple[str, str], str] = {
    ("kind", "rms"): "layer",
    ("kind", "layer"): "rms",
    ("kind", "window"): "causal",
    ("kind", "llama3"): "default",
    ("kind", "linear"): "default",
    ("kind", "yarn"): "default",
    ("layout", "half"): "interleaved",
    ("layout", "interleaved"): "half",
    ("layout", "plain"): "grouped",
    ("layout", "grouped"): "plain",
    ("layout", "gate_first"): "up_first",
    ("layout", "up_first"): "gate_first",
    ("scope", "width"): "heads",
    ("scores", "softmax"): "sigmoid",
    ("scores", "sigmoid"): "softmax",
    ("group_score", "top2"): "max",
    ("activation_name", "silu"): "gelu",
    ("activation_name", "gelu"): "silu",
}
#: Numbers whose change shows in values; the others are sizes.
_FACTORS = ("eps", "scale", "softcap", "factor", "theta", "size", "clip", "jitter")
_FLAGS = ("normalized", "after_top_k")


@dataclass(frozen=True)
class Mutant:
    """A wrong spec.

    Attributes:
        field: the fact that is wrong, as a dotted path.
        change: what was done to it.
        spec: the spec.
    """

    field: str
    change: str
    spec: Architecture


def mutants(spec: Architecture) -> Iterator[Mutant]:
    """Every spec that differs in one fact.

    Args:
        spec: the right one.
    """
    for field, change, wrong in _variants(spec, ""):
        if field.partition(".")[0] not in ("sources", "ignored"):
            yield Mutant(field, change, wrong)


def _variants(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    name = path.rpartition(".")[2]
    if isinstance(value, Number):
        if name in _FACTORS:
            wrong = _wrong(name, value.expression)
            yield path, f"{value.expression} becomes {wrong}", Number(wrong, value.value)
    elif isinstance(value, tuple):
        yield from _in_tuple(value, path)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _in_fields(value, path)
    elif name == "offset" and isinstance(value, (int, float)) and "norm" in path:
        yield path, f"{value} becomes {1.0 - value}", 1.0 - value
    elif name in _FLAGS and isinstance(value, bool):
        yield path, f"{value} becomes {not value}", not value
    elif isinstance(value, str) and (name, value) in _OTHERS:
        yield path, f"{value} becomes {_OTHERS[name, value]}", _OTHERS[name, value]


def _wrong(name: str, expression: str) -> str:
    """Another value; an epsilon has to be far off before FP32 shows it."""
    if name == "size":
        return f"{expression} + 1"
    return f"{100 if name == 'eps' else 1.25} * ({expression})"


def _in_tuple(values: tuple[Any, ...], path: str) -> Iterator[tuple[str, str, Any]]:
    for index, item in enumerate(values):
        if not dataclasses.is_dataclass(item):
            continue
        inner = getattr(item, "name", "") or str(index)
        for field, change, wrong in _variants(item, f"{path}.{inner}"):
            yield field, change, (*values[:index], wrong, *values[index + 1 :])
        if isinstance(item, Term) and len(values) > 1:
            yield f"{path}.{index}", f"without {item.node}", (*values[:index], *values[index + 1 :])


def _in_fields(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        inner = f"{path}.{field.name}".lstrip(".")
        for found, change, wrong in _variants(item, inner):
            yield found, change, _replaced(value, field.name, wrong)


def _replaced(value: Any, name: str, wrong: Any) -> Any:
    """The value with another field; an activation changes by its expression, which is what the port reads."""
    if name == "activation_name":
        return replace(value, activation=repr(wrong).replace("'", '"'), activation_name=wrong)
    return replace(value, **{name: wrong})
