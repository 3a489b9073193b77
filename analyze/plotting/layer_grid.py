"""Sites on a grid: layers and sites outside layers side by side in dataflow order, components below one another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .source import SiteResult

#: Container, layer number and component of a module path; the first number in the path is the layer.
_LAYER = re.compile(r"((?:.*?\.)??)(\d{1,9})(?:\.(.*))?")
_INNER_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
MOST_ROWS = 40


@dataclass(frozen=True)
class Place:
    """Where a site is inside a layer.

    Attributes:
        container: path before the layer number, `model.layers`.
        layer: its number.
        component: what follows, with port and slot: `self_attn[0]`; numbers inside, as of experts, are `*`.
    """

    container: str
    layer: int
    component: str


@dataclass
class Column:
    """A layer, or a site outside layers.

    Attributes:
        label: layer number, or the site's name.
        container: path before the layer number; None outside layers.
        sites: its sites in dataflow order.
        left, right: extent on the horizontal axis; a layer is 1 wide.
    """

    label: str
    container: str | None
    sites: list[SiteResult] = field(default_factory=list)
    left: float = 0.0
    right: float = 1.0

    def position(self, index: int) -> float:
        """Horizontal position of one of its sites."""
        return self.left + (index + 0.5) / len(self.sites) * (self.right - self.left)


def place_of(result: SiteResult) -> Place | None:
    """The layer of a site, or None outside numbered layers."""
    match = _LAYER.fullmatch(result.module)
    if match is None:
        return None
    suffix = result.site.removeprefix(result.module)
    inner = _INNER_NUMBER.sub("*", match[3] or "(layer)")
    return Place(match[1].rstrip("."), int(match[2]), inner + suffix)


def columns_of(sites: Sequence[SiteResult], outside_share: float) -> list[Column]:
    """Columns in dataflow order.

    Args:
        sites: in dataflow order.
        outside_share: width of a site outside layers as a share of the whole, if there is room.
    """
    found: dict[object, Column] = {}
    for site in sites:
        place = place_of(site)
        if place is None:
            found.setdefault(site.site, Column(site.site, None)).sites.append(site)
            continue
        key = (place.container, place.layer)
        found.setdefault(key, Column(str(place.layer), place.container)).sites.append(site)
    columns = list(found.values())
    n_outside = sum(column.container is None for column in columns)
    n_layers = len(columns) - n_outside
    share = min(outside_share, 0.6 / max(n_outside, 1))
    width = share * n_layers / (1.0 - share * n_outside) if n_layers else 1.0
    _spread(columns, width)
    return columns


def _spread(columns: Sequence[Column], width: float) -> None:
    edge = 0.0
    for before, column in zip([None, *columns], columns, strict=False):
        if before is not None and before.container != column.container:
            edge += 0.35 * width
        column.left = edge
        edge = column.right = edge + (1.0 if column.container is not None else width)


def rows_of(sites: Iterable[SiteResult]) -> tuple[list[str], int]:
    """Components in dataflow order, at most `MOST_ROWS`, and the path depth at which they were cut (0: not)."""
    places = [place for place in map(place_of, sites) if place is not None]
    depth = max((place.component.count(".") + 1 for place in places), default=0)
    order: dict[str, int] = {}
    seen: dict[tuple[str, int], int] = {}
    for place in places:
        layer = (place.container, place.layer)
        seen[layer] = seen.get(layer, -1) + 1
        order[place.component] = min(order.get(place.component, seen[layer]), seen[layer])
    names = sorted(order, key=lambda name: order[name])
    cut = 0
    rows = names
    while len(rows) > MOST_ROWS and depth > 1:
        depth -= 1
        cut = depth
        rows = list(dict.fromkeys(row_name(name, cut) for name in names))
    return rows[:MOST_ROWS], cut


def row_name(component: str, cut: int) -> str:
    """The row of a component."""
    return ".".join(component.split(".")[:cut]) if cut else component


def worst(sites: Sequence[SiteResult]) -> SiteResult:
    """The site that a shared cell shows: no value at all first, then the largest, exact ones last."""

    def severity(result: SiteResult) -> tuple[int, float]:
        if result.state in ("nonfinite", "shape_mismatch"):
            return (3, 0.0)
        return (2 if result.verdict == "fail" else 1, result.value) if result.value is not None else (0, 0.0)

    return max(sites, key=severity)
