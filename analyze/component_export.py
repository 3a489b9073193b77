"""Writing a mapping as component_mapping.json, with layers that agree written once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .component_mapping import Component
from .naming import MAIN_SLOTS
from .pairs import Pair, SiteMapping
from .sites import Site, SiteInfo

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.\[:#]|$)")
_MEASURED = re.compile(r" \(relative difference [^)]*\)")
_LETTERS = "ijklmnpq"


def export_components(
    mapping: SiteMapping, reference: Sequence[SiteInfo], target: Sequence[SiteInfo]
) -> dict[str, Any]:
    """A mapping in the form of component_mapping.json; reading it back gives the same pairs.

    Args:
        mapping: what to write; ambiguous sites come out with no target and the candidates in the reasoning.
        reference: sites of the reference.
        target: sites of the target; those without a counterpart are listed with no source.
    """
    components = list(_paired(mapping.pairs, reference, target))
    components += [
        Component((_name(gap.site),), (), f"{gap.status}: {gap.reason}") for gap in mapping.gaps if not gap.site.call
    ]
    paired = {pair.target for pair in mapping.pairs}
    components += [
        Component((), (_name(info.site),), "no site of the reference has this name or these values")
        for info in target
        if info.site not in paired and not info.site.call
    ]
    entries, variables = _compressed(components)
    body: dict[str, Any] = {
        "mapping_size": len(entries),
        "component_mapping": [[list(entry.sources), list(entry.targets)] for entry in entries],
        "variables": variables,
        "reasoning": [entry.reasoning for entry in entries],
    }
    transforms = [_transform(entry) for entry in entries]
    if any(transforms):
        body["transforms"] = transforms
    return body


def _name(site: Site) -> str:
    """A module's path for its main output, else the name of the site."""
    main = site.port == "output" and site.slot in MAIN_SLOTS
    return (replace(site, slot="") if main else site).name


def _transform(entry: Component) -> dict[str, list[list[int]]] | None:
    sides = {"target": entry.target_columns, "reference": entry.reference_columns}
    return {side: [list(span) for span in columns] for side, columns in sides.items() if columns is not None} or None


def _paired(pairs: Sequence[Pair], reference: Sequence[SiteInfo], target: Sequence[SiteInfo]) -> Iterable[Component]:
    """Entries for pairs: parts of a fused site together, everything else one by one.

    Single experts of fused ones are left to the automatic mapping: an entry cannot say which tokens are meant.
    """
    widths = {info.site: info.features for info in target}
    own = {info.site: info.features for info in reference}
    fused: dict[Site, list[Pair]] = {}
    split: dict[Site, list[Pair]] = {}
    for pair in pairs:
        if pair.reference.call or pair.target.call or pair.expert is not None:
            continue
        if pair.transform == "slice" and pair.reference_columns is None:
            fused.setdefault(pair.target, []).append(pair)
        elif pair.reference_columns is not None and pair.columns is None:
            split.setdefault(pair.reference, []).append(pair)
        else:
            yield Component(
                (_name(pair.reference),), (_name(pair.target),), pair.reason, pair.columns, pair.reference_columns
            )
    for site, parts in fused.items():
        yield from _joined(parts, [pair.columns or () for pair in parts], widths[site], of_target=True)
    for site, parts in split.items():
        yield from _joined(parts, [pair.reference_columns or () for pair in parts], own[site], of_target=False)


def _joined(
    parts: Sequence[Pair], columns: Sequence[tuple[tuple[int, int], ...]], width: int | None, *, of_target: bool
) -> Iterable[Component]:
    """One entry if the parts lie one behind the other and fill the whole; else an entry with its range for each."""
    ordered = sorted(zip(columns, parts, strict=True), key=lambda item: item[0])
    ends = [0, *(spans[-1][1] for spans, _ in ordered)]
    tiles = all(len(spans) == 1 for spans in columns) and [spans[0][0] for spans, _ in ordered] == ends[:-1]
    equal = len({_name(pair.target) if of_target else _name(pair.reference) for pair in parts}) == 1
    if tiles and ends[-1] == width and equal:
        pairs = [pair for _, pair in ordered]
        sources = dict.fromkeys(_name(pair.reference) for pair in pairs)
        targets = dict.fromkeys(_name(pair.target) for pair in pairs)
        yield Component(tuple(sources), tuple(targets), pairs[0].reason)
        return
    for pair in parts:
        yield Component(
            (_name(pair.reference),), (_name(pair.target),), pair.reason, pair.columns, pair.reference_columns
        )


@dataclass(frozen=True)
class _Pattern:
    """An entry with its numbers taken out, and a key that tells whether two such entries are alike."""

    entry: Component
    numbers: tuple[str, ...]


def _pattern(component: Component) -> _Pattern:
    """Replace the numbers in module paths by `{0}`, `{1}` where all names of the entry have the same ones."""
    component = replace(component, reasoning=_MEASURED.sub("", component.reasoning))
    names = (*component.sources, *component.targets)
    numbers = tuple(_NUMBER.findall(names[0]))
    if not numbers or any(tuple(_NUMBER.findall(name)) != numbers for name in names):
        return _Pattern(component, ())
    return _Pattern(
        replace(
            component,
            sources=tuple(_numbered(name) for name in component.sources),
            targets=tuple(_numbered(name) for name in component.targets),
            reasoning=_renumbered(component.reasoning, numbers),
        ),
        numbers,
    )


def _numbered(name: str) -> str:
    places = itertools.count()
    return _NUMBER.sub(lambda _: f"{{{next(places)}}}", name)


def _renumbered(text: str, numbers: tuple[str, ...]) -> str:
    return _NUMBER.sub(lambda match: f"{{{numbers.index(match[0])}}}" if match[0] in numbers else match[0], text)


def _compressed(components: Iterable[Component]) -> tuple[list[Component], dict[str, Any]]:
    """Entries with variables for the layers that agree, and what the variables stand for."""
    groups: dict[Component, list[tuple[str, ...]]] = {}
    for pattern in map(_pattern, components):
        groups.setdefault(pattern.entry, []).append(pattern.numbers)
    letters: dict[tuple[int, tuple[int, ...]], str] = {}
    entries = []
    for entry, numbers in groups.items():
        for block in _blocks(numbers):
            names = [
                values[0] if len(values) == 1 else _letter(letters, place, values) for place, values in enumerate(block)
            ]
            entries.append(_named(entry, [name if name.isdigit() else f"{{{name}}}" for name in names]))
    return entries, {letter: _span(values) for (_, values), letter in letters.items()}


def _blocks(numbers: Sequence[tuple[str, ...]]) -> list[list[list[str]]]:
    """The number tuples as products of values per place: one product if they are one, else one per tuple."""
    values = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    if len(set(numbers)) == len(list(itertools.product(*values))):
        return [values]
    return [[[number] for number in one] for one in dict.fromkeys(numbers)]


def _letter(letters: dict[tuple[int, tuple[int, ...]], str], place: int, values: Sequence[str]) -> str:
    """A variable for these values at this place: the same one wherever they come again."""
    key = place, tuple(sorted(map(int, values)))
    if key not in letters:
        again, letter = divmod(len(letters), len(_LETTERS))
        letters[key] = _LETTERS[letter] + (str(again) if again else "")
    return letters[key]


def _named(entry: Component, names: Sequence[str]) -> Component:
    def fill(text: str) -> str:
        for place, name in enumerate(names):
            text = text.replace(f"{{{place}}}", f"\0{name}\0")
        return text.replace("\0", "")

    return replace(
        entry,
        sources=tuple(map(fill, entry.sources)),
        targets=tuple(map(fill, entry.targets)),
        reasoning=fill(entry.reasoning),
    )


def _span(values: tuple[int, ...]) -> dict[str, list[int]]:
    missing = sorted(set(range(values[0], values[-1] + 1)) - set(values))
    return {"range": [values[0], values[-1]]} | ({"except": missing} if missing else {})
