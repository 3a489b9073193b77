"""Which modules, layers and positions a capture keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..store.errors import InputError

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Selection:
    """A filter over sites.

    Attributes:
        include: globs over module paths, `*` crosses dots; empty means all. The root's path is the empty text.
        exclude: globs that win over `include`.
        layers: keep these layer numbers (the first number in a module path); modules outside layers stay.
        positions: keep these token positions.
        inputs: record module inputs too, as port `input`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    positions: range | None = None
    inputs: bool = False

    def keeps(self, module: str) -> bool:
        """Whether sites of this module are recorded."""
        if any(fnmatchcase(module, pattern) for pattern in self.exclude):
            return False
        if self.include and not any(fnmatchcase(module, pattern) for pattern in self.include):
            return False
        layer = _LAYER.search(module)
        return self.layers is None or layer is None or int(layer[1]) in self.layers


def parse_layers(text: str) -> frozenset[int]:
    """Parse `0-3,7` into layer numbers.

    Raises:
        InputError: the text is not a list of numbers and ranges.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"layers {text!r} cannot be read; write for example 0-3,7")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(numbers)


def parse_positions(text: str) -> range:
    """Parse `16-31` (both included) or `16` into token positions.

    Raises:
        InputError: the text is neither a number nor a range.
    """
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise InputError(f"positions {text!r} cannot be read; write for example 0-31")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
