"""R of every token of one site: does the error sit in one position, in one prompt, or everywhere?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb

from ...store.trace import Trace
from .figure import BASELINE, FAIL, GRID, INK, LARGE, NORMAL, SMALL, new_figure, number, plain, save, style, words
from .marks import LIMIT_DASHES, add_colorbar
from .scale import Scale
from .source import Compared, SiteResult, choose_site, compared, site_results

#: More positions than this are pooled: a cell then shows the worst of its positions.
MOST_CELLS = 400
_WIDTH, _UPPER, _ROW = 13.0, 2.4, 0.16
_MOST_HEIGHT = 7.0
_NONFINITE, _UNDEFINED = "#000000", "#FFFFFF"
#: Stands for both errors being 0, and for no such token.
_EXACT, _ABSENT = -1.0, -2.0


@dataclass(frozen=True)
class TokenProfile:
    """Values of one site by prompt and position.

    Attributes:
        comparison: what is compared.
        result: the site, over all prompts.
        prompts: names of the prompts, one per row.
        positions: int64[positions], ascending, without gaps.
        values: float64[prompts, positions]: R, or relative L2 without a baseline. Infinite: only the baseline is
            exact; NaN: a value is not finite; -1: undefined, since both errors are 0; -2: no such token.
    """

    comparison: Compared
    result: SiteResult
    prompts: list[str]
    positions: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def records(self) -> list[dict[str, str | int | float | None]]:
        """One row per token: prompt, position, value (None: undefined)."""
        rows, columns = np.nonzero(self.values != _ABSENT)
        return [
            {
                "prompt": self.prompts[row],
                "position": int(self.positions[column]),
                "value": None if self.values[row, column] < 0 else float(self.values[row, column]),
            }
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]


def plot_tokens(trace: Trace, comparison: str, path: Path, *, site: tuple[str, str] | None = None) -> None:
    """Draw R of every token of one site.

    Above, the median and the largest R of every position over prompts; below, prompts as rows.

    Args:
        trace: the trace.
        comparison: name of a comparison.
        path: PNG file to write.
        site: name and phase; the site with the largest finite R by default.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: it did not measure that site, or the file cannot be written.
    """
    source = compared(trace, comparison)
    draw_tokens(token_profile(trace, source, choose_site(site_results(trace, source), source, *(site or ()))), path)


def token_profile(trace: Trace, comparison: Compared, result: SiteResult) -> TokenProfile:
    """Read the token errors of a site; no prompt at all where none are stored."""
    rows = trace.query(
        """SELECT m.prompt, coalesce(p.id, m.prompt::VARCHAR) AS id, t.position, t.reference_sq,
                  coalesce(t.baseline_sq, 'NaN'::DOUBLE) AS baseline_sq, t.target_sq
           FROM token_errors t JOIN measurements m USING (comparison, measurement)
           JOIN comparisons c USING (comparison) LEFT JOIN prompts p ON p.run = c.reference AND p.prompt = m.prompt
           WHERE comparison = ? AND m.site = ? AND m.target_site = ? AND m.phase = ?
                 AND m.prompt IS NOT NULL AND t.position >= 0
           ORDER BY m.prompt, t.position""",
        [comparison.name, result.site, result.target_site, result.phase],
    )
    if not rows.num_rows:
        return TokenProfile(comparison, result, [], np.zeros(0, np.int64), np.zeros((0, 0)))
    prompt, position = (rows.column(name).to_numpy().astype(np.int64) for name in ("prompt", "position"))
    squares = (rows.column(name).to_numpy().astype(np.float64) for name in ("reference_sq", "baseline_sq", "target_sq"))
    known, row = np.unique(prompt, return_inverse=True)
    names = dict(zip(prompt.tolist(), rows.column("id").to_pylist(), strict=True))
    positions = np.arange(position.min(), position.max() + 1)
    values = np.full((len(known), len(positions)), _ABSENT)
    values[row, position - positions[0]] = _values(*squares, has_baseline=comparison.baseline is not None)
    return TokenProfile(comparison, result, [names[key] for key in known.tolist()], positions, values)


def _values(
    reference: npt.NDArray[np.float64],
    baseline: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    *,
    has_baseline: bool,
) -> npt.NDArray[np.float64]:
    """R = ||t - r|| / (||b - r|| + 1e-12 ||r||) per token, or ||t - r|| / ||r||, from sums of squares."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if not has_baseline:
            return np.where((target == 0) & (reference == 0), _EXACT, np.sqrt(target) / np.sqrt(reference))
        ratio = np.sqrt(target) / (np.sqrt(baseline) + 1e-12 * np.sqrt(reference))
    exact = baseline == 0
    return np.where(exact, np.where(np.isnan(target), np.nan, np.where(target > 0, np.inf, _EXACT)), ratio)


def draw_tokens(source: TokenProfile, path: Path) -> None:
    """Draw what `token_profile` read."""
    title = f"{plain(source.result.site, 80)} ({source.result.phase}): {plain(source.comparison.headline, 120)}"
    n = len(source.prompts)
    lower = min(max(n * _ROW, 1.6), _MOST_HEIGHT)
    figure = new_figure(_WIDTH, _UPPER + lower + 1.6)
    if not n:
        words(figure, title, "The comparison stored no token errors for this site.")
        save(figure, path)
        return
    scale = Scale.of(source.comparison.quantity, source.comparison.limit)
    result = source.result
    interval = f" [{number(result.low)}, {number(result.high)}]" if result.low is not None else ""
    summary = f"{scale.quantity} over all tokens = {number(result.value)}{interval}, {result.verdict}; {_worst(source)}"
    figure.suptitle(f"{title}\n{summary}", fontsize=LARGE - 1, x=0.01, ha="left", color=INK, linespacing=1.5)
    upper, below = figure.subplots(2, 1, sharex=True, height_ratios=[_UPPER, lower])
    _draw_positions(upper, source, scale)
    _draw_prompts(below, source, scale)
    add_colorbar(figure, below if lower > 1.7 else [upper, below], scale)
    save(figure, path)


def _worst(source: TokenProfile) -> str:
    values = np.where(np.isfinite(source.values), source.values, -3.0)
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    where = f"at position {source.positions[column]} of prompt {plain(source.prompts[row], 24)}"
    return f"largest {number(float(values[row, column]))} {where}" if values[row, column] > 0 else "all tokens exact"


def _draw_positions(axes: Any, source: TokenProfile, scale: Scale) -> None:
    style(axes)
    x, median, top = by_position(source)
    heights = [np.array([scale.height(value) for value in series]) for series in (median, top)]
    dots = "o" if len(x) <= 100 else None
    axes.scatter(x, heights[1], s=10, color=FAIL, marker="D", linewidths=0, label="largest of all prompts", zorder=3)
    axes.plot(x, heights[0], color=BASELINE, linewidth=1.3, marker=dots, ms=3.5, label="median of prompts", zorder=4)
    limit = scale.height(scale.limit)
    axes.axhline(limit, color=INK, linewidth=1.0, linestyle=LIMIT_DASHES, label=f"limit {scale.limit:.3g}", zorder=1)
    drawn = [height for series in heights for height in series if math.isfinite(height)]
    low, high = min([-0.5, *drawn]), max([1.2 * limit, 0.5, *drawn])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.06 * (high - low))
    axes.set_yticks(*scale.ticks(low, high))
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.tick_params(labelbottom=False)
    axes.set_ylabel(f"{scale.quantity}\n(compressed log axis)", fontsize=NORMAL, color=INK)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=SMALL)


def _draw_prompts(axes: Any, source: TokenProfile, scale: Scale) -> None:
    style(axes)
    values, width = pooled(source.values)
    pixels = np.array([[to_rgb(_color(value, scale)) for value in row] for row in values.tolist()])
    left, n = source.positions[0] - 0.5, len(source.prompts)
    axes.imshow(pixels, extent=(left, left + values.shape[1] * width, n, 0), aspect="auto", interpolation="nearest")
    every = max(1, math.ceil(n * 0.14 / _MOST_HEIGHT))
    axes.set_yticks([i + 0.5 for i in range(0, n, every)], [plain(name, 24) for name in source.prompts[::every]])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left, source.positions[-1] + 0.5)
    note = f"; a cell is the worst of {width} positions" if width > 1 else ""
    axes.set_xlabel(f"token position{note}  (black: NaN or Inf, white: exact or no token)", fontsize=NORMAL, color=INK)
    axes.set_ylabel("prompt", fontsize=NORMAL, color=INK)


def by_position(source: TokenProfile) -> tuple[npt.NDArray[np.float64], ...]:
    """Positions, and the median and largest finite value there; NaN where there is none, so that gaps stay gaps.

    With more than `MOST_CELLS` positions, the middles of equally many positions taken together.
    """
    finite = np.where(np.isfinite(source.values) & (source.values > 0), source.values, np.nan)
    width = math.ceil(finite.shape[1] / MOST_CELLS)
    padded = np.pad(finite, ((0, 0), (0, -finite.shape[1] % width)), constant_values=np.nan)
    cells = padded.reshape(len(finite), -1, width).transpose(1, 0, 2).reshape(-1, len(finite) * width)
    some = ~np.isnan(cells).all(axis=1)
    median, top = np.full(len(cells), np.nan), np.full(len(cells), np.nan)
    median[some], top[some] = np.nanmedian(cells[some], axis=1), np.nanmax(cells[some], axis=1)
    return source.positions[0] + width * np.arange(len(cells)) + (width - 1) / 2, median, top


def pooled(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], int]:
    """At most `MOST_CELLS` columns, each the worst of equally many positions (NaN first), and how many."""
    width = math.ceil(values.shape[1] / MOST_CELLS)
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % width)), constant_values=_ABSENT)
    return padded.reshape(len(values), -1, width).max(axis=2), width


def _color(value: float, scale: Scale) -> str:
    if math.isnan(value):
        return _NONFINITE
    return _UNDEFINED if value < 0 else scale.colors[scale.band(value)]
