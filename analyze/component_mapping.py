"""The file component_mapping.json: which modules of a source model correspond to which of a target model.

    {
      "mapping_size": 2,
      "component_mapping": [
        [["model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.k_proj"], ["layers.{i}.self_attn.qk"]],
        [["model.layers.{j}.mlp.gate"], []]
      ],
      "variables": {"i": {"range": [0, 47]}, "j": {"range": [0, 47], "except": {"every": 4, "from": 3}}},
      "reasoning": ["the port fuses the two", "the port has no such module"]
    }

Modules stand for their main output; another one is written as a site, `layers.0.mlp.router[1]`. `(root)` is the model.
Several sources with one target are concatenated along the features, and so are several targets of one source, unless
all are equally wide: then each holds the same. `transforms`, parallel to the entries and optional, holds the ranges of
features of an entry that is neither.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..store.errors import InputError
from .ranks import Columns

_VARIABLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Component:
    """One entry: modules of both models, either possibly none.

    Attributes:
        sources: modules (or sites) of the reference.
        targets: their counterparts.
        reasoning: why, for people.
        target_columns: features of the only target that are meant; None for all.
        reference_columns: features of the only source that are meant; None for all.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    reasoning: str = ""
    target_columns: Columns | None = None
    reference_columns: Columns | None = None


@dataclass(frozen=True)
class ComponentMapping:
    """The entries of a file, one per layer where variables were used, and the file's name."""

    name: str
    components: tuple[Component, ...]


def read_component_mapping(path: Path) -> ComponentMapping:
    """Read a file and expand its variables.

    Raises:
        InputError: it cannot be read, or is not of this form; the message says where.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}); 'sleuth map ... --write FILE' writes one to start from"
        ) from error
    entries = body.get("component_mapping") if isinstance(body, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path} has no list 'component_mapping' of [[source modules], [target modules]] pairs")
    size = body.get("mapping_size", len(entries))
    if size != len(entries):
        raise InputError(f"{path} says mapping_size {size} but holds {len(entries)} entries; correct one of them")
    variables = {name: _values(name, value, path) for name, value in dict(body.get("variables") or {}).items()}
    components: list[Component] = []
    for number, entry in enumerate(entries):
        reasoning = _reasoning(body.get("reasoning"), number)
        transform = _transform(body.get("transforms"), number, path)
        components.extend(_expanded(_component(entry, number, path, reasoning, transform), variables, path))
    return ComponentMapping(path.name, tuple(components))


def _component(
    entry: Any, number: int, path: Path, reasoning: str, transform: tuple[Columns | None, Columns | None]
) -> Component:
    sides = [[side] if isinstance(side, str) else side for side in entry] if isinstance(entry, list) else []
    names = [side for side in sides[:2] if isinstance(side, list) and all(isinstance(name, str) for name in side)]
    if len(sides) not in (2, 3) or len(names) != 2 or not any(names):
        raise InputError(f"{path}: entry {number} is not [[source modules], [target modules]] but {json.dumps(entry)}")
    if len(sides) == 3 and isinstance(sides[2], list):
        reasoning = "; ".join(map(str, sides[2]))
    return Component(tuple(names[0]), tuple(names[1]), reasoning, *transform)


def _values(name: str, value: Any, path: Path) -> list[int]:
    """Values of a variable: a list, `{"range": [first, last], "except": ...}`, or text such as `0..47`."""
    if isinstance(value, str):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\.?|-|to)\s*(\d+)\s*", value)
        value = {"range": [int(ends[1]), int(ends[2])]} if ends else None
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    span = value.get("range") if isinstance(value, dict) else None
    if not (isinstance(span, list) and len(span) == 2 and all(type(item) is int for item in span)):
        raise InputError(f'{path}: variable {name!r} needs a list of numbers or {{"range": [first, last]}}')
    left_out = value.get("except", [])
    if isinstance(left_out, dict):
        every, start = left_out.get("every"), left_out.get("from", span[0])
        if type(every) is not int or every < 1 or type(start) is not int:
            raise InputError(f'{path}: variable {name!r}: "except" needs {{"every": n, "from": first}}')
        left_out = range(start, span[1] + 1, every)
    return [item for item in range(span[0], span[1] + 1) if item not in left_out]


def _reasoning(reasoning: Any, number: int) -> str:
    if isinstance(reasoning, list):
        return str(reasoning[number]) if number < len(reasoning) else ""
    if isinstance(reasoning, dict):
        return str(reasoning.get(str(number), ""))
    return str(reasoning or "")


def _transform(transforms: Any, number: int, path: Path) -> tuple[Columns | None, Columns | None]:
    """Ranges of the target and of the reference in an entry's transform."""
    spec = transforms[number] if isinstance(transforms, list) and number < len(transforms) else None
    if spec is None:
        return None, None
    sides = []
    for side in ("target", "reference"):
        spans = spec.get(side) if isinstance(spec, dict) else ()
        if spans is not None and not (
            isinstance(spans, list)
            and spans
            and all(isinstance(s, list) and len(s) == 2 and all(type(item) is int for item in s) for s in spans)
        ):
            raise InputError(f'{path}: transform {number} needs ranges like {{"target": [[0, 64]]}}')
        sides.append(None if spans is None else tuple((start, stop) for start, stop in spans))
    return sides[0], sides[1]


def _expanded(component: Component, variables: Mapping[str, Sequence[int]], path: Path) -> list[Component]:
    names = [*component.sources, *component.targets]
    used = list(dict.fromkeys(name for text in names for name in _VARIABLE.findall(text)))
    if unknown := [name for name in used if name not in variables]:
        raise InputError(f"{path}: variable {unknown[0]!r} is used but not listed under 'variables'")
    expanded = []
    for values in itertools.product(*(variables[name] for name in used)):
        known = dict(zip(used, map(str, values), strict=True))
        expanded.append(
            replace(
                component,
                sources=tuple(_filled(name, known) for name in component.sources),
                targets=tuple(_filled(name, known) for name in component.targets),
                reasoning=_filled(component.reasoning, known),
            )
        )
    return expanded


def _filled(text: str, known: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: known.get(match[1], match[0]), text)
