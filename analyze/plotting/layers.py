"""R by layer and component: where it starts, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...store.trace import Trace
from .figure import GRID, INK, LARGE, NORMAL, new_figure, number, plain, save
from .layer_grid import columns_of, rows_of
from .layer_panels import Heights, draw_cells, draw_profile, label_columns, name_first, shade_layers, span_columns
from .marks import MARKS, add_colorbar, add_legend
from .scale import Scale
from .source import Compared, SiteResult, compared, first_failure, largest, site_results

#: Two phases fit side by side up to this many columns.
_MOST_BESIDE = 18
#: A colour bar is as high as the lower panel, or as both when that has fewer rows.
_FEW_ROWS = 9
#: Inches.
_ROW, _PROFILE, _LABELS, _TITLE, _OUTSIDE = 0.19, 2.5, 1.5, 1.2, 0.175
_WIDTH, _WIDTH_BESIDE = 13.0, 14.0


def plot_layers(trace: Trace, comparison: str, path: Path, *, phase: str | None = None) -> None:
    """Draw R (relative L2 in a comparison without a baseline) of every site, by layer and component.

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
    """Draw sites by phase, as `source.site_results` gives them."""
    scale = Scale.of(source.quantity, source.limit)
    everything = [site for sites in results.values() for site in sites]
    rows, cut = rows_of(everything)
    heights = Heights.of(everything, scale)
    beside = len(results) == 2 and max(len(columns_of(sites, 0.0)) for sites in results.values()) <= _MOST_BESIDE
    width = _WIDTH_BESIDE * 0.38 if beside else _WIDTH * 0.76
    figure, profiles, heatmaps = _panels(len(results), len(rows), beside)
    for i, (phase, sites) in enumerate(results.items()):
        columns, first = columns_of(sites, _OUTSIDE / width), first_failure(sites)
        draw_profile(profiles[i], columns, scale, heights)
        profiles[i].set_title(_headline(phase, sites, scale), fontsize=NORMAL + 1, loc="left", color=INK)
        if first is not None:
            name_first(profiles[i], columns, first, heights.of_site(first, scale))
        span_columns(profiles[i], columns)
        shade_layers(profiles[i], columns)
        _label_heights(profiles[i], scale, heights, labelled=i == 0 or not beside)
        if heatmaps:
            draw_cells(heatmaps[i], columns, rows, cut, scale, first)
            span_columns(heatmaps[i], columns)
            heatmaps[i].tick_params(axis="y", length=0)
            names = [plain(row, 46) for row in rows]
            heatmaps[i].set_yticks([row + 0.5 for row in range(len(rows))], names if i == 0 or not beside else [])
        label_columns((heatmaps or profiles)[i], columns, width)
    for pair in list(zip(profiles, heatmaps, strict=False))[-1 if beside else 0 :]:
        add_colorbar(figure, pair[1] if len(rows) >= _FEW_ROWS else pair, scale)
    add_legend(figure, everything, scale)
    figure.suptitle(_title(source, everything), fontsize=LARGE, x=0.01, ha="left", color=INK)
    save(figure, path)


def _panels(n: int, n_rows: int, beside: bool) -> tuple[Any, list[Any], list[Any]]:
    """The figure, its upper panels and, if there are layers, its lower ones."""
    heights = [_PROFILE, max(n_rows * _ROW, 0.6)] if n_rows else [_PROFILE + 0.5]
    blocks = 1 if beside else n
    figure = new_figure(_WIDTH_BESIDE if beside else _WIDTH, (sum(heights) + _LABELS) * blocks + _TITLE)
    columns = n if beside else 1
    axes = figure.subplots(len(heights) * blocks, columns, squeeze=False, height_ratios=heights * blocks)
    upper = [axes[row][column] for row in range(0, len(axes), len(heights)) for column in range(columns)]
    lower = [axes[row][column] for row in range(1, len(axes), 2) for column in range(columns)] if n_rows else []
    return figure, upper, lower


def _label_heights(axes: Any, scale: Scale, heights: Heights, *, labelled: bool) -> None:
    margin = 0.03 * (heights.high - heights.low)
    ticks, labels = scale.ticks(heights.low - margin, heights.high + margin)
    ticks += heights.lanes.values()
    labels += [MARKS[key].lane for key in heights.lanes]
    axes.set_yticks(ticks, labels if labelled else [""] * len(ticks))
    axes.yaxis.grid(True, color=GRID, linewidth=0.7)
    if labelled:
        axes.set_ylabel(f"{scale.quantity} (compressed log axis)", fontsize=NORMAL, color=INK)


def _headline(phase: str, sites: Sequence[SiteResult], scale: Scale) -> str:
    first, top = first_failure(sites), largest(sites)
    if first is None:
        where = f"; largest {scale.quantity} {number(top.value)} at {plain(top.site, 28)}" if top else ""
        return f"{phase}: 0 of {len(sites)} measurements fail{where}"
    failing = sum(site.verdict == "fail" for site in sites)
    interval = f" [{number(first.low)}, {number(first.high)}]" if first.low is not None else ""
    value = f"{scale.quantity} = {number(first.value)}{interval}"
    reason = value if first.value is not None else first.state.replace("_", " ")
    return f"{phase}: {failing} of {len(sites)} measurements fail, the first with {reason}"


def _title(source: Compared, sites: Sequence[SiteResult]) -> str:
    failing = sum(site.verdict == "fail" for site in sites)
    verdict = f"{source.verdict}, {failing} of {len(sites)} measurements fail"
    return f"{plain(source.headline, 150)}\ncomparison {plain(source.name, 60)}: {verdict}"
