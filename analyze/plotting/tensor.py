"""A tensor as a map, positions by features: which channels are hot, which positions, and where the errors sit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ...store.dims import by_position
from ...store.errors import InputError
from ...store.trace import Trace
from ..align import AlignedSite
from ..stored_pairs import aligned_pair
from .figure import BASELINE, FAIL, GRID, INK, LARGE, NORMAL, SMALL, new_figure, number, plain, save, style, words
from .source import Compared, SiteResult, choose_site, compared, listing, site_results

FloatArray = npt.NDArray[np.float64]
#: A map has at most this many cells along an axis; each then shows the extreme of what it covers.
MOST_CELLS = 512
_WIDTH, _MAP = 12.5, 3.4
_NONFINITE = "#00A37A"
WHAT = ("error", "reference", "baseline", "target")


@dataclass(frozen=True)
class ValueMap:
    """Values of one tensor, pooled to what a picture resolves.

    Attributes:
        name: what they are.
        color: of its profiles.
        values: float64[rows, columns], of each cell the value of largest magnitude; NaN marks one that is not finite.
        by_position: float64[positions], root mean square over features.
        by_feature: float64[features], root mean square over positions.
    """

    name: str
    color: str
    values: FloatArray
    by_position: FloatArray
    by_feature: FloatArray


@dataclass(frozen=True)
class TensorMap:
    """What is drawn.

    Attributes:
        title: of the picture.
        first_position: of the first row; None: rows are no token positions.
        maps: one, or baseline and target.
    """

    title: str
    first_position: int | None
    maps: tuple[ValueMap, ...]


def plot_tensor(
    trace: Trace, comparison: str, path: Path, *, site: tuple[str, str] | None = None, prompt: int | None = None,
    what: str = "error",
) -> None:  # fmt: skip
    """Draw a site of a comparison, values or errors, for one prompt.

    Args:
        trace: the trace.
        comparison: name of a comparison.
        path: PNG file to write.
        site: name and phase; the site with the largest finite R by default.
        prompt: index in the reference; the first that was compared by default.
        what: `error` (of the baseline and the target, on one scale), `reference`, `baseline` or `target`.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: it did not compare that, or the file cannot be written.
    """
    source = compared(trace, comparison)
    result = choose_site(site_results(trace, source), source, *(site or ()))
    draw_tensor(compared_map(trace, source, result, prompt, what), path)


def compared_map(
    trace: Trace, comparison: Compared, result: SiteResult, prompt: int | None = None, what: str = "error"
) -> TensorMap:
    """Read a site of a comparison; see `plot_tensor`.

    Raises:
        InputError: that prompt was not compared, there is no baseline to draw, or shapes differ.
    """
    aligned = aligned_pair(trace, comparison.name, result.site, result.target_site).get(result.phase, {})
    if what == "baseline" and comparison.baseline is None:
        raise InputError(f"comparison {comparison.name!r} has no baseline; draw 'reference', 'target' or 'error'")
    chosen = next(iter(aligned), None) if prompt is None else prompt
    if chosen is None or chosen not in aligned:
        known = listing(map(str, aligned)) or "none"
        raise InputError(f"{result.site} ({result.phase}) was not compared for prompt {prompt}; its prompts: {known}")
    if clash := aligned[chosen].clash():
        raise InputError(f"{result.site} ({result.phase}) has no errors: {clash}; draw 'reference' or 'target'")
    sides, first = _rows(aligned[chosen])
    title = f"{plain(result.site, 80)} ({result.phase}), prompt {chosen}"
    if what != "error":
        run = {"reference": comparison.reference, "baseline": comparison.baseline, "target": comparison.target}[what]
        return TensorMap(title, first, (_pooled_map(f"{what}: {plain(run or '')}", INK, sides[what]),))
    names = {"baseline": (comparison.baseline, BASELINE), "target": (comparison.target, FAIL)}
    with np.errstate(invalid="ignore", over="ignore"):
        errors = {name: sides[name] - sides["reference"] for name in names if name in sides}
    maps = tuple(
        _pooled_map(f"error of the {name}: {plain(names[name][0] or '')}", names[name][1], values)
        for name, values in errors.items()
    )
    value = "" if result.value is None else f": {comparison.quantity} = {number(result.value)} over all prompts"
    return TensorMap(f"{title}{value}", first, maps)


def stored_map(trace: Trace, tensor_id: int) -> TensorMap:
    """Read one stored tensor.

    Raises:
        TraceNotFoundError: there is no such tensor.
        InputError: only its statistics were kept, or it is complex.
    """
    stored = trace.tensor(tensor_id)
    if stored.values.dtype.kind == "c":
        raise InputError(f"tensor {tensor_id} ({stored.site}) is complex: it has no map")
    positioned = stored.position_start is not None
    rows = by_position(stored.values, stored.dims) if positioned else _matrix(stored.values)
    title = f"tensor {tensor_id}: {plain(stored.site, 80)} {list(stored.values.shape)} {stored.values.dtype.name}"
    trace_map = _pooled_map(f"values, dims {stored.dims or 'unknown'}", INK, rows.astype(np.float64))
    return TensorMap(title, stored.position_start, (trace_map,))


def _matrix(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)


def _rows(site: AlignedSite) -> tuple[Mapping[str, FloatArray], int]:
    """All rows of one prompt, widened."""
    parts: dict[str, list[FloatArray]] = {}
    first: int | None = None
    for triple in site:
        first = int(triple.positions[0]) if first is None else first
        for name, rows in (("reference", triple.reference), ("baseline", triple.baseline), ("target", triple.target)):
            if rows is not None:
                parts.setdefault(name, []).append(rows.astype(np.float64))
    return {name: np.concatenate(rows) for name, rows in parts.items()}, first or 0


def _pooled_map(name: str, color: str, rows: FloatArray) -> ValueMap:
    finite = np.where(np.isfinite(rows), rows, 0.0)
    bad = ~np.isfinite(rows)
    for axis in (0, 1):
        finite, bad = _extremes(finite, axis), np.asarray(_blocks(bad, axis).any(axis=axis + 1))
    with np.errstate(over="ignore"):
        square = np.where(np.isfinite(rows), rows, 0.0) ** 2
    by_rows, by_columns = (np.sqrt(square.mean(axis=axis)) for axis in (1, 0))
    return ValueMap(name, color, np.where(bad, np.nan, finite), by_rows, by_columns)


def _blocks(values: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """The axis split into at most `MOST_CELLS` blocks of equal length; the last is filled up with its last value."""
    length = values.shape[axis]
    width = math.ceil(length / MOST_CELLS)
    missing = -length % width
    pad = [(0, missing if i == axis else 0) for i in range(2)]
    filled = np.pad(values, pad, mode="edge") if missing else values
    shape = (*filled.shape[:axis], filled.shape[axis] // width, width, *filled.shape[axis + 1 :])
    return filled.reshape(shape)


def _extremes(values: FloatArray, axis: int) -> FloatArray:
    """Of every block the value of largest magnitude, with its sign."""
    blocks = _blocks(values, axis)
    high, low = blocks.max(axis=axis + 1), blocks.min(axis=axis + 1)
    return np.asarray(np.where(high >= -low, high, low))


def draw_tensor(source: TensorMap, path: Path) -> None:
    """Draw what `compared_map` or `stored_map` read."""
    figure = new_figure(_WIDTH, 1.0 + (_MAP + 0.9) * len(source.maps))
    values = np.concatenate([one.values[np.isfinite(one.values)] for one in source.maps])
    if not values.size or not np.any(values):
        words(figure, source.title, "Every value is zero." if values.size else "No value is finite.")
        save(figure, path)
        return
    figure.suptitle(source.title, fontsize=LARGE - 1, x=0.01, ha="left", color=INK)
    norm = _norm(values)
    grid = figure.add_gridspec(2 * len(source.maps), 2, height_ratios=[0.8, _MAP] * len(source.maps),
                               width_ratios=[1.0, 0.13])  # fmt: skip
    images = []
    for i, one in enumerate(source.maps):
        images.append(_draw_map(figure, grid, 2 * i, one, source.first_position, norm, source.maps))
    bar = figure.colorbar(images[0], ax=figure.axes, pad=0.012, fraction=0.02, aspect=30)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    bar.set_label("extreme value of a cell; green: NaN or Inf", fontsize=NORMAL, color=INK)
    save(figure, path)


def _norm(values: FloatArray) -> SymLogNorm:
    """Linear up to the median magnitude, logarithmic beyond: outliers show, and so does what lies between them."""
    magnitudes = np.abs(values[values != 0.0])
    largest = float(magnitudes.max())
    linear = max(float(np.median(magnitudes)), largest * 1e-6)
    return SymLogNorm(linthresh=linear, linscale=0.7, vmin=-largest, vmax=largest)


def _draw_map(
    figure: Any, grid: Any, row: int, one: ValueMap, first: int | None, norm: SymLogNorm, maps: tuple[ValueMap, ...]
) -> Any:
    """The map, with root mean squares of features above and of positions beside it."""
    axes = figure.add_subplot(grid[row + 1, 0])
    n, width = len(one.by_position), len(one.by_feature)
    start = first or 0
    extent = (-0.5, width - 0.5, start + n - 0.5, start - 0.5)
    image = axes.imshow(np.ma.masked_invalid(one.values), extent=extent, aspect="auto", interpolation="nearest",
                        cmap=_colormap(), norm=norm)  # fmt: skip
    style(axes)
    axes.set_xlabel("feature", fontsize=NORMAL, color=INK)
    axes.set_ylabel("token position" if first is not None else "row", fontsize=NORMAL, color=INK)
    above = figure.add_subplot(grid[row, 0], sharex=axes)
    beside = figure.add_subplot(grid[row + 1, 1], sharey=axes)
    for other in maps:
        strong = other is one
        look = {"color": other.color, "linewidth": 1.2 if strong else 0.7, "alpha": 1.0 if strong else 0.45}
        above.plot(np.arange(width), other.by_feature, **look)
        beside.plot(other.by_position, start + np.arange(n), **look, marker="." if n <= 60 else None, markersize=3)
    for panel in (above, beside):
        style(panel)
        panel.grid(True, color=GRID, linewidth=0.6)
    _scaled(above, "y", np.concatenate([other.by_feature for other in maps]))
    _scaled(beside, "x", np.concatenate([other.by_position for other in maps]))
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    above.set_title(f"{_caption(one, start)}  (lines: root mean square)", fontsize=NORMAL, loc="left", color=INK)
    return image


def _colormap() -> Any:
    return colormaps["RdBu_r"].with_extremes(bad=_NONFINITE)


def _caption(source: ValueMap, start: int) -> str:
    """Where the values of a map are largest."""
    feature, row = int(source.by_feature.argmax()), int(source.by_position.argmax())
    typical = float(np.median(source.by_feature)) or 1.0
    times = number(float(source.by_feature[feature]) / typical)
    return f"{source.name}; feature {feature} is {times} times the median feature, position {start + row} the largest"


def _scaled(axes: Any, which: str, values: FloatArray) -> None:
    """Logarithmic where values differ by more than a factor of ten; few ticks, all of them readable."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    some = values[values > 0.0]
    if len(some) and some.max() > 10.0 * some.min():
        axes.set(**{f"{which}scale": "log"})
    else:
        axis.set_major_locator(MaxNLocator(3))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axis.set_minor_formatter(NullFormatter())
