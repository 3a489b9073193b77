"""How sites without a finite R are drawn, and what the colours and marks mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D

from .figure import FAINT, INK, NORMAL, SMALL, VERDICT_COLORS
from .scale import Scale
from .source import SiteResult

#: Dashes of the line at the limit.
LIMIT_DASHES = (0, (5, 3))


@dataclass(frozen=True)
class Mark:
    """How a state is drawn.

    Attributes:
        lane: its label on the axis of heights.
        marker: drawn inside its cell.
        fill: colour of the cell; None: as a failing or passing site.
        ink: colour of the marker.
        meaning: for the legend.
    """

    lane: str
    marker: str
    fill: str | None
    ink: str
    meaning: str


MARKS = {
    "exact": Mark("exact", "$=$", "#FFFFFF", INK, "exact: no error"),
    "undefined": Mark("?", "$?$", "#FFFFFF", INK, "undefined"),
    "baseline_exact": Mark("∞", r"$\infty$", None, "#FFFFFF", "only the baseline is exact"),
    "nonfinite": Mark("NaN", "x", "#000000", "#FFFFFF", "NaN or Inf"),
    "shape_mismatch": Mark("shape", r"$\neq$", "#000000", "#FFFFFF", "shapes differ"),
}


def mark_of(site: SiteResult) -> str:
    """The key of the mark of a site; empty for a finite positive value, which has a height and a colour."""
    if site.state in ("nonfinite", "shape_mismatch"):
        return site.state
    if site.value is None:
        return site.state if site.state in MARKS else "undefined"
    if site.value == 0.0:
        return "exact"
    return "baseline_exact" if math.isinf(site.value) else ""


def fill_of(site: SiteResult, scale: Scale) -> str:
    """Colour of a site's cell."""
    mark = mark_of(site)
    if not mark:
        return scale.colors[scale.band(site.value or 0.0)]
    return MARKS[mark].fill or (scale.colors[-1] if site.verdict == "fail" else scale.colors[1])


def ink_of(site: SiteResult) -> str:
    """Colour of the mark inside a site's cell."""
    mark = MARKS[mark_of(site)]
    return INK if mark.fill is None and site.verdict != "fail" else mark.ink


def point_style(verdict: str) -> dict[str, Any]:
    """Marker of a verdict: its shape and fill say it as well as its colour."""
    color = VERDICT_COLORS[verdict]
    face = "white" if verdict == "undecided" else color
    return {"marker": "D" if verdict == "fail" else "o", "color": color, "face": face}


def stroke_of(marker: str) -> float:
    """Line width of a marker: letters are outlines already."""
    return 0.2 if marker.startswith("$") else 1.0


def add_colorbar(figure: Any, axes: Any, scale: Scale) -> None:
    """The bands of the scale beside a panel, or a list of panels."""
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.colormap), ax=axes, pad=0.015, fraction=0.03, aspect=22)
    bar.set_ticks(
        [i + 0.5 for i in range(len(scale.edges))],
        labels=[f"{edge:.3g}" if edge >= 0.01 else f"{edge:.1e}" for edge in scale.edges],
    )
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=0)
    bar.outline.set_visible(False)
    bar.set_label(f"{scale.quantity}, in colour beyond {scale.limit:.3g}", fontsize=NORMAL, color=INK)


def add_legend(figure: Any, sites: Sequence[SiteResult], scale: Scale) -> None:
    """What the marks mean, for those that occur."""
    entries = []
    for verdict in VERDICT_COLORS:
        if any(site.verdict == verdict for site in sites):
            look = point_style(verdict)
            entries.append(_entry(verdict, look["marker"], look["color"], look["face"]))
    if any(site.low is not None for site in sites):
        entries.append(_entry(f"95 % interval of {scale.quantity}", "|", FAINT, FAINT, size=10))
    entries.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=LIMIT_DASHES, label=f"limit {scale.limit:.3g}"))
    for key, mark in MARKS.items():
        if any(mark_of(site) == key for site in sites):
            entries.append(_entry(mark.meaning, mark.marker, INK, INK))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=SMALL)


def _entry(label: str, marker: str, color: str, face: str, size: float = 5.5) -> Any:
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=size,
        markeredgewidth=stroke_of(marker),
        color=color,
        markerfacecolor=face,
        label=label,
    )
