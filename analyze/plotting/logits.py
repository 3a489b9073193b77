"""Next-token distributions by prompt and position: where the target's part from the reference's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ...store.errors import InputError
from ...store.trace import Trace
from .figure import BASELINE, FAIL, GRID, INK, LARGE, NORMAL, SMALL, new_figure, number, plain, save, style
from .marks import LIMIT_DASHES
from .source import Compared, compared
from .tokens import pooled

FloatArray = npt.NDArray[np.float64]
_WIDTH, _PANEL, _ROW, _MOST_HEIGHT = 13.0, 1.7, 0.16, 6.0
#: KL divergences below this are drawn as this: it is where float64 ends for logits of ordinary size.
_LEAST = 1e-10


@dataclass(frozen=True)
class LogitMap:
    """Rows of the `logits` table by prompt and position.

    Attributes:
        comparison: what is compared.
        prompts: names, one per row.
        positions: int64[positions], ascending, without gaps.
        kl, kl_baseline, r: float64[prompts, positions]; NaN where undefined or not compared.
        flips: bool[prompts, positions]; failing: bool, the position is beyond every limit of a clean port.
        first_decode: per prompt, the first position that was computed in decode; -1 without any.
    """

    comparison: Compared
    prompts: list[str]
    positions: npt.NDArray[np.int64]
    kl: FloatArray
    kl_baseline: FloatArray
    r: FloatArray
    flips: npt.NDArray[np.bool_]
    failing: npt.NDArray[np.bool_]
    first_decode: list[int]

    @property
    def compared(self) -> npt.NDArray[np.bool_]:
        """Where there is a row."""
        return np.asarray(~np.isnan(self.kl) | self.failing)


def plot_logits(trace: Trace, comparison: str, path: Path) -> None:
    """Draw KL, R and other first tokens of every position; `sleuth logits` has to have measured them.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: its logits were not judged yet, or the file cannot be written.
    """
    draw_logits(logit_map(trace, compared(trace, comparison)), path)


def logit_map(trace: Trace, comparison: Compared) -> LogitMap:
    """Read the rows of a comparison.

    Raises:
        InputError: there are none.
    """
    rows = trace.query(
        """SELECT l.prompt, coalesce(p.id, l.prompt::VARCHAR) AS id, l.position, l.phase, l.verdict = 'fail' AS failing,
                  coalesce(NOT l.top1, false) AS flip, coalesce(l.kl, 'NaN'::DOUBLE) AS kl,
                  coalesce(l.kl_baseline, 'NaN'::DOUBLE) AS kl_baseline, coalesce(l.r_ratio, 'NaN'::DOUBLE) AS r
           FROM logits l JOIN comparisons c USING (comparison)
           LEFT JOIN prompts p ON p.run = c.reference AND p.prompt = l.prompt
           WHERE comparison = ? ORDER BY l.prompt, l.position""",
        [comparison.name],
    )
    if not rows.num_rows:
        raise InputError(
            f"the logits of comparison {comparison.name!r} were not judged; run 'sleuth logits {trace.path} "
            f"{comparison.name}' first"
        )
    prompt, position = (rows[name].to_numpy().astype(np.int64) for name in ("prompt", "position"))
    known, row = np.unique(prompt, return_inverse=True)
    names = dict(zip(prompt.tolist(), rows["id"].to_pylist(), strict=True))
    positions = np.arange(position.min(), position.max() + 1)
    place = (row, position - positions[0])

    def grid(name: str, empty: float) -> FloatArray:
        values = np.full((len(known), len(positions)), empty)
        values[place] = np.asarray(rows[name].to_numpy(zero_copy_only=False), np.float64)
        return values

    decode = np.array([phase == "decode" for phase in rows["phase"].to_pylist()], bool)
    starts = [int(position[decode & (prompt == key)].min(initial=1 << 40)) for key in known.tolist()]
    return LogitMap(
        comparison, [names[key] for key in known.tolist()], positions, grid("kl", np.nan), grid("kl_baseline", np.nan),
        grid("r", np.nan), grid("flip", 0.0) > 0, grid("failing", 0.0) > 0,
        [-1 if start == 1 << 40 else start for start in starts],
    )  # fmt: skip


def draw_logits(source: LogitMap, path: Path) -> None:
    """Draw what `logit_map` read."""
    n = len(source.prompts)
    lower = min(max(n * _ROW, 1.4), _MOST_HEIGHT)
    figure = new_figure(_WIDTH, 2 * _PANEL + lower + 1.7)
    title = f"next-token distributions: {plain(source.comparison.target)} against {plain(source.comparison.reference)}"
    figure.suptitle(f"{title}\n{_caption(source)}", fontsize=LARGE - 1, x=0.01, ha="left", color=INK, linespacing=1.5)
    top, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[_PANEL, _PANEL, lower])
    _draw_kl(top, source)
    _draw_r(middle, source)
    image = _draw_map(below, source)
    bar = figure.colorbar(image, ax=below, pad=0.012, fraction=0.025, aspect=14)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    bar.set_label("KL, nats", fontsize=NORMAL, color=INK)
    below.set_xlim(source.positions[0] - 0.5, source.positions[-1] + 0.5)
    save(figure, path)


def _caption(source: LogitMap) -> str:
    worst = np.nan_to_num(source.kl, nan=-1.0)
    row, column = np.unravel_index(int(worst.argmax()), worst.shape)
    return "    ".join(
        (
            f"{int(source.compared.sum())} positions",
            f"{int(source.flips.sum())} with another first token",
            f"{int(source.failing.sum())} beyond what a clean port shows",
            f"largest KL {number(float(worst[row, column]))} at position {source.positions[column]} of prompt "
            f"{plain(source.prompts[row], 24)}",
        )
    )


def _draw_kl(axes: Any, source: LogitMap) -> None:
    style(axes)
    for values, color, name in ((source.kl_baseline, BASELINE, "baseline"), (source.kl, FAIL, "target")):
        if (~np.isnan(values)).any():
            x, y = _points(source, np.maximum(values, _LEAST))
            axes.scatter(x, y, s=9, color=color, alpha=0.6, linewidths=0, label=name)
    rows, columns = np.nonzero(source.flips)
    if len(rows):
        heights = np.maximum(source.kl[rows, columns], _LEAST)
        axes.scatter(source.positions[columns], heights, s=44, facecolors="none", edgecolors=INK, linewidths=1.0,
                     label="another first token")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("KL, nats", fontsize=NORMAL, color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=SMALL)


def _draw_r(axes: Any, source: LogitMap) -> None:
    style(axes)
    finite = np.where(np.isfinite(source.r) & (source.r > 0), source.r, np.nan)
    if (~np.isnan(finite)).any():
        x, y = _points(source, finite)
        bad = source.failing[~np.isnan(finite)]
        axes.scatter(x[~bad], y[~bad], s=9, color=FAIL, alpha=0.6, linewidths=0)
        axes.scatter(x[bad], y[bad], s=26, color=FAIL, marker="D", linewidths=0)
        axes.set_yscale("log")
        wide = np.nanmax(finite) > 100.0 * np.nanmin(finite)
        axes.yaxis.set_major_locator(LogLocator(10.0, (1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        limit = source.comparison.limit
        axes.axhline(1.0, color=BASELINE, linewidth=1.0)
        axes.axhline(limit, color=INK, linewidth=1.0, linestyle=LIMIT_DASHES)
    axes.set_ylabel("R of a position", fontsize=NORMAL, color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)


def _draw_map(axes: Any, source: LogitMap) -> Any:
    style(axes)
    known = ~np.isnan(source.kl)
    values, width = pooled(np.where(known, np.maximum(source.kl, _LEAST), -2.0))
    shown = np.ma.masked_less(values, 0.0)
    low = float(shown.min()) if shown.count() else _LEAST
    high = max(float(shown.max()) if shown.count() else 1.0, low * 10.0)
    left, n = source.positions[0] - 0.5, len(source.prompts)
    image = axes.imshow(
        shown, extent=(left, left + values.shape[1] * width, n, 0), aspect="auto", interpolation="nearest",
        cmap="magma_r", norm=LogNorm(low, high),
    )  # fmt: skip
    rows, columns = np.nonzero(source.flips)
    axes.scatter(source.positions[columns], rows + 0.5, s=18, facecolors="none", edgecolors=BASELINE, linewidths=1.2)
    rows, columns = np.nonzero(source.failing)
    axes.scatter(source.positions[columns], rows + 0.5, s=12, color="#00A37A", marker="x", linewidths=1.3)
    for row, start in enumerate(source.first_decode):
        if start > source.positions[0]:
            axes.plot([start - 0.5] * 2, [row, row + 1], color=INK, linewidth=1.6)
    every = max(1, math.ceil(n * 0.14 / _MOST_HEIGHT))
    axes.set_yticks([i + 0.5 for i in range(0, n, every)], [plain(name, 24) for name in source.prompts[::every]])
    axes.tick_params(axis="y", length=0)
    note = f"; a cell is the worst of {width}" if width > 1 else ""
    meaning = "bar: first decode step, circle: another first token, cross: beyond a clean port, white: not compared"
    axes.set_xlabel(f"token position{note}  ({meaning})", fontsize=NORMAL, color=INK)
    axes.set_ylabel("prompt", fontsize=NORMAL, color=INK)
    return image


def _points(source: LogitMap, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    rows, columns = np.nonzero(~np.isnan(values))
    return source.positions[columns].astype(np.float64), values[rows, columns]
