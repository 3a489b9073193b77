"""The two panels of the layers picture: heights of sites in dataflow order, and cells by layer and component."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.patches import Rectangle

from .figure import FAINT, FIRST, GRID, INK, NORMAL, VERDICT_COLORS, plain, style
from .layer_grid import Column, place_of, row_name, worst
from .marks import LIMIT_DASHES, MARKS, fill_of, ink_of, mark_of, point_style, stroke_of
from .scale import Scale
from .source import SiteResult

#: Inches that a rotated name, and a character of a horizontal one, take.
_NAME_WIDTH, _LETTER_WIDTH = 0.155, 0.075
_LONGEST_NAME = 36


@dataclass(frozen=True)
class Heights:
    """The vertical axis of the upper panels: finite values from `low` to `high`, lanes for everything else."""

    low: float
    high: float
    lanes: dict[str, float]

    @classmethod
    def of(cls, sites: Sequence[SiteResult], scale: Scale) -> Heights:
        """An axis that holds all sites and their intervals."""
        values = [v for site in sites for v in (site.value, site.low, site.high) if v is not None]
        heights = [height for height in map(scale.height, values) if math.isfinite(height)]
        low, high = min([*heights, -0.9]), max([*heights, 1.3 * scale.height(scale.limit), 0.5])
        step = 0.1 * (high - low)
        below = [key for key in MARKS if key == "exact" and any(mark_of(site) == key for site in sites)]
        above = [key for key in MARKS if key != "exact" and any(mark_of(site) == key for site in sites)]
        lanes = {key: low - step * (i + 1) for i, key in enumerate(below)}
        lanes |= {key: high + step * (i + 1) for i, key in enumerate(above)}
        return cls(low, high, lanes)

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the axis, with room for a name at the top."""
        ends = [self.low, self.high, *self.lanes.values()]
        span = self.high - self.low
        return min(ends) - 0.05 * span, max(ends) + 0.2 * span

    def of_site(self, site: SiteResult, scale: Scale) -> float:
        """Where a site is drawn."""
        mark = mark_of(site)
        return self.lanes[mark] if mark else scale.height(site.value or 0.0)


def draw_profile(axes: Any, columns: Sequence[Column], scale: Scale, heights: Heights) -> None:
    """Sites in dataflow order, with intervals and the limit."""
    style(axes)
    points = [(column.position(i), site) for column in columns for i, site in enumerate(column.sites)]
    low, high = heights.limits
    ends = [
        (x, max(scale.height(site.low), low), min(scale.height(site.high), high), VERDICT_COLORS[site.verdict])
        for x, site in points
        if site.low is not None and site.high is not None and not mark_of(site)
    ]
    whiskers = [[(x, bottom), (x, top)] for x, bottom, top, _ in ends]
    axes.add_collection(LineCollection(whiskers, colors=[e[3] for e in ends], linewidths=1.1, alpha=0.65, zorder=2))
    size = 26.0 if len(points) <= 150 else 12.0 if len(points) <= 500 else 6.0
    for order, verdict in enumerate(VERDICT_COLORS):
        chosen = [(x, heights.of_site(site, scale)) for x, site in points if site.verdict == verdict]
        look = point_style(verdict)
        axes.scatter(
            [x for x, _ in chosen],
            [y for _, y in chosen],
            s=size,
            c=look["face"],
            edgecolors=look["color"],
            marker=look["marker"],
            linewidths=0.9,
            zorder=3 + order,
        )
    axes.axhline(scale.height(scale.limit), color=INK, linewidth=1.0, linestyle=LIMIT_DASHES, zorder=1)
    axes.set_ylim(low, high)


def name_first(axes: Any, columns: Sequence[Column], first: SiteResult, y: float) -> None:
    """Ring the first failing site and name it above the data."""
    x = next(column.position(i) for column in columns for i, site in enumerate(column.sites) if site is first)
    on_the_right = x > (columns[0].left + columns[-1].right) / 2
    axes.axvline(x, color=FIRST, linewidth=0.9, zorder=1.5)
    axes.scatter([x], [y], s=110, facecolors="none", edgecolors=FIRST, linewidths=1.3, zorder=6)
    axes.annotate(
        f"starts at {plain(first.site, 62)}",
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if on_the_right else 5, -1),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        va="top",
        fontsize=NORMAL,
        fontweight="bold",
        color=FIRST,
        zorder=7,
    )


def draw_cells(
    axes: Any, columns: Sequence[Column], rows: Sequence[str], cut: int, scale: Scale, first: SiteResult | None
) -> None:
    """Cells of component by layer; sites outside layers fill their column; the first failing site has a frame."""
    style(axes)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    cells: dict[str, list[tuple[Rectangle, str]]] = {"white": [], FAINT: []}
    marks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for column in columns:
        for top, bottom, sites in _cells(column, rows, cut):
            shown = worst(sites)
            cell, fill = ((column.left, top), column.right - column.left, bottom - top), fill_of(shown, scale)
            cells[FAINT if fill == "#FFFFFF" else "white"].append((Rectangle(*cell), fill))
            if mark := mark_of(shown):
                middle = ((column.left + column.right) / 2, (top + bottom) / 2)
                marks.setdefault((MARKS[mark].marker, ink_of(shown)), []).append(middle)
            if first is not None and any(site is first for site in sites):
                for width, ink in ((5.0, "white"), (2.2, FIRST)):  # seen on dark cells too
                    axes.add_patch(Rectangle(*cell, fill=False, linewidth=width, edgecolor=ink, zorder=5))
    for edge, drawn in cells.items():
        fills = [fill for _, fill in drawn]
        patches = [patch for patch, _ in drawn]
        axes.add_collection(PatchCollection(patches, facecolors=fills, edgecolors=edge, linewidths=0.6))
    for (marker, ink), at in marks.items():
        axes.scatter(
            [x for x, _ in at], [y for _, y in at], s=18, c=ink, marker=marker, linewidths=stroke_of(marker), zorder=3
        )
    axes.set_ylim(len(rows), 0)


def _cells(column: Column, rows: Sequence[str], cut: int) -> list[tuple[float, float, list[SiteResult]]]:
    """Top, bottom and sites of every cell of a column."""
    if column.container is None:
        return [(0.0, float(len(rows)), column.sites)]
    found: dict[str, list[SiteResult]] = {}
    for site in column.sites:
        place = place_of(site)
        if place is not None:
            found.setdefault(row_name(place.component, cut), []).append(site)
    return [(float(i), i + 1.0, found[row]) for i, row in enumerate(rows) if row in found]


def span_columns(axes: Any, columns: Sequence[Column]) -> None:
    """The horizontal extent that both panels share."""
    left, right = columns[0].left, columns[-1].right
    axes.set_xlim(left - 0.004 * (right - left), right + 0.004 * (right - left))


def shade_layers(axes: Any, columns: Sequence[Column]) -> None:
    """Every other layer (ten layers, when there are many) shaded, instead of ticks."""
    axes.set_xticks([])
    block = 1 if len(columns) <= 50 else 10
    for column in columns:
        if column.container is not None and len(columns) > 1 and int(column.label) // block % 2 == 0:
            axes.axvspan(column.left, column.right, color=GRID, alpha=0.4, linewidth=0, zorder=0)


def label_columns(axes: Any, columns: Sequence[Column], width: float) -> None:
    """Layer numbers, the names of sites outside layers, and below the numbers whose layers they are.

    Args:
        axes: the lower panel.
        columns: in dataflow order.
        width: of the panel, inches.
    """
    per_inch = (columns[-1].right - columns[0].left) / width
    labels: list[tuple[float, str, bool]] = []
    for column in columns:
        middle, outside = (column.left + column.right) / 2, column.container is None
        digits = len(column.label) * _LETTER_WIDTH + 0.05
        room = (_NAME_WIDTH if outside else max(_NAME_WIDTH, digits)) * per_inch
        if labels and middle - labels[-1][0] < 0.99 * room:
            continue
        labels.append((middle, plain(column.label, _LONGEST_NAME), outside))
    axes.set_xticks([x for x, _, _ in labels], [text for _, text, _ in labels])
    for tick, (_, _, outside) in zip(axes.get_xticklabels(), labels, strict=True):
        tick.set_rotation(90 if outside else 0)
    for container, group in groupby(columns, key=lambda column: column.container):
        members = list(group)
        if container is not None:
            middle, inches = (members[0].left + members[-1].right) / 2, (members[-1].right - members[0].left) / per_inch
            _name_container(axes, container, middle, int(inches / _LETTER_WIDTH))


def _name_container(axes: Any, container: str, middle: float, letters: int) -> None:
    text = f"layer of {container or '(root)'}"
    if len(text) > letters:
        text = container
    if letters < 4:
        return
    axes.annotate(
        plain(text, letters),
        (middle, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -18),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=NORMAL,
        color=INK,
    )
