"""R by layer and component: where it starts, at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ...store.trace import Trace
from .figure import FAINT, FIRST, GRID, INK, LARGE, NORMAL, SMALL, VERDICT_COLORS, new_figure, number, plain, save, style
from .layer_grid import Column, columns_of, first_failure, largest, place_of, row_name, rows_of, worst
from .scale import Scale
from .source import Compared, SiteResult, compared, site_results

#: Two phases fit side by side up to this many columns.
_BESIDE = 18
_ROW_HEIGHT, _PROFILE_HEIGHT, _LABEL_WIDTH = 0.19, 2.5, 0.17
#: Cells without a colour of their own: fill, mark, colour of the mark, meaning.
_MARKS = {
    "exact": ("#FFFFFF", "$=$", FAINT, "exact: no error at all"),
    "baseline_exact": (None, r"$\infty$", "#FFFFFF", "only the baseline is exact"),
    "nonfinite": ("#000000", "x", "#FFFFFF", "NaN or Inf"),
    "shape_mismatch": ("#000000", r"$\neq$", "#FFFFFF", "shapes differ"),
    "undefined": ("#FFFFFF", "$?$", INK, "undefined"),
}
_LANES = {"exact": "exact", "baseline_exact": "∞", "nonfinite": "NaN, Inf", "shape_mismatch": "shape", "undefined": "?"}
_FIGURE_NOTE = "beyond the limit, heights are compressed"


def plot_layers(trace: Trace, comparison: str, path: Path, *, phase: str | None = None) -> None:
    """Draw R (relative L2 in a comparison without a baseline) of every site and by layer and component.

    Above, sites in dataflow order with their 95 % intervals and the limit; below, the same sites as cells, layers
    side by side and components below one another, with sites outside layers as columns of their own. A cell of
    several sites (experts, very many components) shows the worst.

    Args:
        trace: the trace.
        comparison: name of a comparison.
        path: PNG file to write.
        phase: `prefill`, `decode` or `forward`; all of them by default.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: nothing was measured in that phase, or the file cannot be written.
    """
    source = compared(trace, comparison)
    draw_layers(source, site_results(trace, source, phase), path)


def draw_layers(source: Compared, results: dict[str, list[SiteResult]], path: Path) -> None:
    """Draw sites by phase, as `site_results` gives them."""
    scale = Scale.of(source.quantity, source.limit)
    everything = [site for sites in results.values() for site in sites]
    rows, cut = rows_of(everything)
    many = max(len(columns_of(sites, 0.03)) for sites in results.values())
    beside = len(results) == 2 and many <= _BESIDE
    width = 14.0 if beside else 13.0
    panel_width = width * (0.34 if beside else 0.76)
    grid = {phase: columns_of(sites, _LABEL_WIDTH / panel_width) for phase, sites in results.items()}
    figure, profiles, heatmaps = _panels(len(results), len(rows), beside, width)
    low, high, lanes = _extent(everything, scale)
    for phase, profile, heatmap in zip(results, profiles, heatmaps, strict=True):
        leftmost = not beside or profile is profiles[0]
        first = first_failure(results[phase])
        _profile(profile, grid[phase], scale, (low, high, lanes), first)
        _headline(profile, phase, results[phase], scale)
        if heatmap is not None:
            _heatmap(heatmap, grid[phase], rows, cut, scale, first)
        _columns_axis(heatmap or profile, grid[phase], panel_width, labelled=True)
        if heatmap is not None:
            _columns_axis(profile, grid[phase], panel_width, labelled=False)
        _left_axis(profile, heatmap, scale, (low, high, lanes), rows, leftmost)
    _colorbar(figure, [axes for axes in heatmaps if axes is not None], scale)
    _legend(figure, everything, scale)
    failing = sum(site.verdict == "fail" for site in everything)
    figure.suptitle(
        f"{plain(source.headline, 150)}\n"
        f"comparison {plain(source.name, 60)}: {source.verdict}, {failing} of {len(everything)} sites fail",
        fontsize=LARGE, x=0.01, ha="left", color=INK,
    )  # fmt: skip
    save(figure, path)


def _panels(n: int, n_rows: int, beside: bool, width: float) -> tuple[Any, list[Any], list[Any]]:
    """Axes of the profiles and, if there are layers, of the heatmaps."""
    heights = [_PROFILE_HEIGHT, max(n_rows * _ROW_HEIGHT, 0.6)] if n_rows else [_PROFILE_HEIGHT + 1.0]
    repeats = 1 if beside else n
    figure = new_figure(width, sum(heights) * repeats + 1.5 * repeats + 1.2)
    shape = (len(heights), n) if beside else (len(heights) * n, 1)
    axes = figure.subplots(*shape, squeeze=False, height_ratios=heights * repeats)
    listed = [[axes[row][i] if beside else axes[len(heights) * i + row][0] for i in range(n)] for row in (0, -1)]
    if not beside:
        listed[1] = [axes[len(heights) * (i + 1) - 1][0] for i in range(n)]
    return figure, listed[0], listed[1] if n_rows else [None] * n


def _extent(sites: Sequence[SiteResult], scale: Scale) -> tuple[float, float, dict[str, float]]:
    """Lowest and highest height of finite values, and the heights of the lanes of all other states."""
    values = [v for site in sites for v in (site.value, site.low, site.high) if v is not None]
    heights = [height for height in map(scale.height, values) if math.isfinite(height)]
    low = min([*heights, -0.9])
    high = max([*heights, scale.height(scale.limit) * 1.3])
    step = 0.09 * (high - low)
    present = [state for state in _LANES if any(state_of(site) == state for site in sites)]
    lanes = {}
    for state in present:
        if state == "exact":
            lanes[state] = low = low - step
        else:
            lanes[state] = high = high + step
    return low - 0.4 * step, high + 0.6 * step, lanes


def state_of(site: SiteResult) -> str:
    """The state that decides how a site is drawn; empty for a finite positive value."""
    if site.value is not None and 0.0 < site.value < math.inf:
        return ""
    if site.value == 0.0 or site.state == "exact":
        return "exact"
    return "baseline_exact" if site.value == math.inf else site.state if site.state in _MARKS else "undefined"


def _profile(axes: Any, columns: Sequence[Column], scale: Scale, extent: Any, first: SiteResult | None) -> None:
    low, high, lanes = extent
    style(axes)
    points = [(column.position(i), site) for column in columns for i, site in enumerate(column.sites)]
    size = 26.0 if len(points) <= 150 else 12.0 if len(points) <= 500 else 6.0
    whiskers = [
        [(x, max(scale.height(site.low), low)), (x, min(scale.height(site.high), high))]
        for x, site in points
        if site.low is not None and site.high is not None and not state_of(site)
    ]
    colors = [VERDICT_COLORS[s.verdict] for _, s in points if s.low is not None and s.high is not None and not state_of(s)]
    axes.add_collection(LineCollection(whiskers, colors=colors, linewidths=1.0, alpha=0.7, zorder=2))
    for verdict, color in VERDICT_COLORS.items():
        for state in ("", *lanes):
            chosen = [(x, site) for x, site in points if site.verdict == verdict and state_of(site) == state]
            heights = [lanes[state] if state else scale.height(site.value or 0.0) for _, site in chosen]
            face = "white" if verdict == "undecided" else color
            axes.scatter(
                [x for x, _ in chosen], heights, s=size, c=face, edgecolors=color, linewidths=1.0,
                marker="D" if verdict == "fail" else "o", zorder=4 if verdict == "fail" else 3,
            )  # fmt: skip
    axes.axhline(scale.height(scale.limit), color=INK, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
    if first is not None:
        x = next(x for x, site in points if site is first)
        state = state_of(first)
        _name_first(axes, columns, x, lanes[state] if state else scale.height(first.value or 0.0), first, high - low)


def _name_first(axes: Any, columns: Sequence[Column], x: float, y: float, first: SiteResult, span: float) -> None:
    """Ring the first failing site and name it above the data."""
    top = y + 0.0 * span
    right_half = x > (columns[0].left + columns[-1].right) / 2
    axes.axvline(x, color=FIRST, linewidth=0.9, zorder=1.5)
    axes.scatter([x], [top], s=110, facecolors="none", edgecolors=FIRST, linewidths=1.3, zorder=5)
    axes.annotate(
        f"{'' if right_half else '← '}starts at {plain(first.site, 60)}{' →' if right_half else ''}",
        (x, 1.0), xycoords=("data", "axes fraction"), xytext=(-5 if right_half else 5, 1), textcoords="offset points",
        ha="right" if right_half else "left", va="top", fontsize=NORMAL, fontweight="bold", color=FIRST,
    )  # fmt: skip


def _headline(axes: Any, phase: str, sites: Sequence[SiteResult], scale: Scale) -> None:
    first, top = first_failure(sites), largest(sites)
    failing = sum(site.verdict == "fail" for site in sites)
    if first is not None:
        interval = f" [{number(first.low)}, {number(first.high)}]" if first.low is not None else ""
        value = f"{scale.quantity} = {number(first.value)}{interval}" if first.value is not None else first.state
        text = f"{phase}: {failing} of {len(sites)} sites fail, the first with {value.replace('_', ' ')}"
    else:
        where = f", largest {scale.quantity} {number(top.value)} at {plain(top.site, 40)}" if top else ""
        text = f"{phase}: none of {len(sites)} sites fails{where}"
    axes.set_title(text, fontsize=NORMAL + 1, loc="left", color=INK, pad=6)


def _heatmap(
    axes: Any, columns: Sequence[Column], rows: Sequence[str], cut: int, scale: Scale, first: SiteResult | None
) -> None:
    style(axes)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    patches, colors, marks = [], [], []
    for column in columns:
        for top, bottom, sites in _cells(column, rows, cut):
            shown = worst(sites)
            patches.append(Rectangle((column.left, top), column.right - column.left, bottom - top))
            colors.append(_fill(shown, scale))
            if state_of(shown):
                marks.append(((column.left + column.right) / 2, (top + bottom) / 2, shown))
            if first is not None and any(site is first for site in sites):
                axes.add_patch(
                    Rectangle((column.left, top), column.right - column.left, bottom - top, fill=False, linewidth=2.2,
                              edgecolor=FIRST, zorder=5)
                )  # fmt: skip
    axes.add_collection(PatchCollection(patches, facecolors=colors, edgecolors="white", linewidths=0.6))
    for state, (_, marker, color, _) in _MARKS.items():
        chosen = [mark for mark in marks if state_of(mark[2]) == state]
        for failing in (False, True):
            at = [(x, y) for x, y, site in chosen if (site.verdict == "fail") is failing]
            ink = color if failing or state not in ("baseline_exact",) else INK
            axes.scatter([x for x, _ in at], [y for _, y in at], s=16, c=ink, marker=marker, linewidths=0.9, zorder=3)
    axes.set_ylim(len(rows), 0)


def _cells(column: Column, rows: Sequence[str], cut: int) -> list[tuple[float, float, list[SiteResult]]]:
    """Top, bottom and sites of every cell of a column; a site outside layers fills its column."""
    if column.container is None:
        return [(0.0, float(len(rows)), column.sites)]
    found: dict[str, list[SiteResult]] = {}
    for site in column.sites:
        place = place_of(site)
        if place is not None:
            found.setdefault(row_name(place.component, cut), []).append(site)
    return [(float(i), i + 1.0, found[row]) for i, row in enumerate(rows) if row in found]


def _fill(site: SiteResult, scale: Scale) -> str:
    state = state_of(site)
    if not state:
        return scale.colors[scale.band(site.value or 0.0)]
    fill = _MARKS[state][0]
    return fill or (scale.colors[-1] if site.verdict == "fail" else scale.colors[1])


def _columns_axis(axes: Any, columns: Sequence[Column], panel_width: float, *, labelled: bool) -> None:
    """Layer numbers and the names of sites outside layers."""
    left, right = columns[0].left, columns[-1].right
    axes.set_xlim(left - 0.004 * (right - left), right + 0.004 * (right - left))
    if not labelled:
        axes.set_xticks([])
        for column in columns:
            if column.container is not None and (len(columns) <= 40 or int(column.label) % 10 == 0):
                axes.axvspan(column.left, column.right, color=GRID, alpha=0.35 if int(column.label) % 2 == 0 else 0.0, linewidth=0)
        return
    per_label = (right - left) / panel_width * 0.16
    at: list[tuple[float, str, bool]] = []
    n_containers = len({column.container for column in columns if column.container is not None})
    before: Column | None = None
    for column in columns:
        middle = (column.left + column.right) / 2
        if at and middle - at[-1][0] < per_label * (0.99 if column.container is None else 1.9):
            before = column
            continue
        starts = column.container is not None and (before is None or before.container != column.container)
        named = column.container is None or (starts and n_containers > 1)
        text = column.label if column.container is None else f"{column.container}.{column.label}" if named else column.label
        at.append((middle, plain(text, 30), named))
        before = column
    axes.set_xticks([x for x, _, _ in at], [text for _, text, _ in at])
    for label, (_, _, named) in zip(axes.get_xticklabels(), at, strict=True):
        label.set_rotation(90 if named else 0)
    containers = [column.container for column in columns if column.container is not None]
    if n_containers == 1:
        axes.set_xlabel(f"layer of {plain(containers[0] or '(root)', 60)}, and sites outside layers", fontsize=NORMAL, color=INK)
    elif n_containers == 0:
        axes.set_xlabel("site, in dataflow order", fontsize=NORMAL, color=INK)


def _left_axis(profile: Any, heatmap: Any, scale: Scale, extent: Any, rows: Sequence[str], labelled: bool) -> None:
    low, high, lanes = extent
    headroom = 0.13 * (high - low)
    profile.set_ylim(low, high + headroom)
    inner_low = max((h for s, h in lanes.items() if s == "exact"), default=low)
    inner_high = min((h for s, h in lanes.items() if s != "exact"), default=high)
    ticks, labels = scale.ticks(inner_low + 0.04 * (high - low), inner_high - 0.04 * (high - low))
    ticks += list(lanes.values())
    labels += [_LANES[state] for state in lanes]
    profile.set_yticks(ticks, labels if labelled else [""] * len(ticks))
    profile.yaxis.grid(True, color=GRID, linewidth=0.7)
    if labelled:
        profile.set_ylabel(f"{scale.quantity} (compressed log axis)", fontsize=NORMAL, color=INK)
    if heatmap is not None:
        heatmap.set_yticks([i + 0.5 for i in range(len(rows))], [plain(row, 34) for row in rows] if labelled else [])
        heatmap.tick_params(axis="y", length=0)


def _colorbar(figure: Any, heatmaps: Sequence[Any], scale: Scale) -> None:
    if not heatmaps:
        return
    mappable = ScalarMappable(scale.norm, scale.colormap)
    bar = figure.colorbar(mappable, ax=heatmaps[-1], pad=0.015, fraction=0.03, aspect=22)
    bar.set_ticks([i + 0.5 for i in range(len(scale.edges))], labels=[f"{edge:.2g}" for edge in scale.edges])
    bar.ax.tick_params(labelsize=SMALL, color=FAINT, length=0)
    bar.outline.set_visible(False)
    bar.set_label(f"{scale.quantity}; beyond {scale.limit:.3g} in colour", fontsize=NORMAL, color=INK)


def _legend(figure: Any, sites: Sequence[SiteResult], scale: Scale) -> None:
    entries: list[Any] = []
    for verdict, color in VERDICT_COLORS.items():
        if any(site.verdict == verdict for site in sites):
            face = "white" if verdict == "undecided" else color
            marker = "D" if verdict == "fail" else "o"
            entries.append(
                Line2D([], [], color=color, marker=marker, markerfacecolor=face, markersize=5, label=verdict)
            )
    entries[-1:] = entries[-1:]
    entries.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (5, 3)), label=f"limit {scale.limit:.3g}"))
    for state, (fill, marker, color, meaning) in _MARKS.items():
        if any(state_of(site) == state for site in sites):
            entries.append(
                Line2D([], [], linestyle="none", marker=marker, markersize=6, color=INK if color == "#FFFFFF" else color,
                       label=meaning)
            )  # fmt: skip
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=SMALL)
