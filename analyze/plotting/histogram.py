"""How large the errors of one site are: the target's beside the baseline's, counted in bins of equal ratio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...store.trace import Trace
from ..align import AlignedSite
from ..stored_pairs import aligned_pair
from .figure import (
    BASELINE,
    FAIL,
    FAINT,
    GRID,
    INK,
    LARGE,
    NORMAL,
    SMALL,
    new_figure,
    number,
    plain,
    save,
    style,
    words,
)
from .source import Compared, SiteResult, choose_site, compared, site_results

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
#: Bins per decade of the error.
PER_DECADE = 8
_LEAST, _MOST = -45, 39
_SIZE = (12.5, 5.2)


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of one run against the reference, by magnitude.

    A magnitude e with 10^(i / PER_DECADE) <= e < 10^((i + 1) / PER_DECADE) is counted in bin i - PER_DECADE * -45:
    every float32 has a bin, so no outlier takes the resolution away from the others.

    Attributes:
        positive, negative: int64[bins], elements whose error has that sign and magnitude.
        zero: elements without error.
        nonfinite: elements whose error is NaN or infinite.
    """

    positive: IntArray
    negative: IntArray
    zero: int
    nonfinite: int

    @classmethod
    def of(cls, errors: FloatArray) -> ErrorCounts:
        """Count errors of any shape."""
        finite = errors[np.isfinite(errors)]
        sides = [_counted(finite[finite > 0.0]), _counted(-finite[finite < 0.0])]
        zero = len(finite) - int(sides[0].sum() + sides[1].sum())
        return cls(sides[0], sides[1], zero, errors.size - len(finite))

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.positive + other.positive,
            self.negative + other.negative,
            self.zero + other.zero,
            self.nonfinite + other.nonfinite,
        )

    @property
    def magnitudes(self) -> IntArray:
        """Both signs together."""
        return self.positive + self.negative

    @property
    def n(self) -> int:
        """Elements in all."""
        return int(self.magnitudes.sum()) + self.zero + self.nonfinite


#: Lower ends of the bins, and the upper end of the last.
EDGES = 10.0 ** (np.arange((_MOST - _LEAST) * PER_DECADE + 1) / PER_DECADE + _LEAST)


@dataclass(frozen=True)
class Histogram:
    """The errors of a site: of the target, and of the baseline if there is one."""

    comparison: Compared
    result: SiteResult
    baseline: ErrorCounts | None
    target: ErrorCounts


def plot_histogram(trace: Trace, comparison: str, path: Path, *, site: tuple[str, str] | None = None) -> None:
    """Draw how the errors of one site are distributed over magnitudes.

    Left, the share of elements in every bin; right, the share of elements with a larger error, which shows tails down
    to the last element. Errors of 0 and those that are not finite have no magnitude: they are counted in the legend.

    Args:
        trace: the trace; the values are read from its shards, piece by piece.
        comparison: name of a comparison.
        path: PNG file to write.
        site: name and phase; the site with the largest finite R by default.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: it did not measure that site, or the file cannot be written.
    """
    source = compared(trace, comparison)
    result = choose_site(site_results(trace, source), source, *(site or ()))
    draw_histogram(error_histogram(trace, source, result), path)


def error_histogram(trace: Trace, comparison: Compared, result: SiteResult) -> Histogram:
    """Count the errors of a site.

    Raises:
        InputError: reference and target differ in shape.
    """
    aligned = aligned_pair(trace, comparison.name, result.site, result.target_site).get(result.phase, {})
    nothing = ErrorCounts.of(np.zeros(0))
    baseline, target = nothing, nothing
    for site in aligned.values():
        one, other = _of_prompt(site)
        baseline, target = baseline + one, target + other
        trace.release_pages()
    return Histogram(comparison, result, baseline if comparison.baseline is not None else None, target)


def _of_prompt(site: AlignedSite) -> tuple[ErrorCounts, ErrorCounts]:
    baseline, target = ErrorCounts.of(np.zeros(0)), ErrorCounts.of(np.zeros(0))
    with np.errstate(invalid="ignore", over="ignore"):
        for triple in site:
            reference = triple.reference.astype(np.float64)
            target += ErrorCounts.of(triple.target.astype(np.float64) - reference)
            if triple.baseline is not None:
                baseline += ErrorCounts.of(triple.baseline.astype(np.float64) - reference)
    return baseline, target


def _counted(magnitudes: FloatArray) -> IntArray:
    place = np.searchsorted(EDGES, magnitudes, side="right") - 1
    return np.bincount(np.clip(place, 0, len(EDGES) - 2), minlength=len(EDGES) - 1)


def draw_histogram(source: Histogram, path: Path) -> None:
    """Draw what `error_histogram` counted."""
    figure = new_figure(*_SIZE)
    title = f"{plain(source.result.site, 80)} ({source.result.phase}): {plain(source.comparison.headline, 120)}"
    sides = [(source.baseline, BASELINE, "baseline"), (source.target, FAIL, "target")]
    drawn = [(counts, color, name) for counts, color, name in sides if counts is not None]
    total = sum(counts.magnitudes for counts, _, _ in drawn)
    filled = np.flatnonzero(total)
    if not len(filled):
        words(figure, title, "No element has an error that is finite and not zero.")
        save(figure, path)
        return
    figure.suptitle(f"{title}\n{caption(source)}", fontsize=LARGE - 1, x=0.01, ha="left", color=INK, linespacing=1.5)
    left, right = figure.subplots(1, 2)
    bins = slice(int(filled[0]), int(filled[-1]) + 1)
    for counts, color, name in drawn:
        _draw_shares(left, counts, bins, color, _label(name, counts))
        _draw_tail(right, counts, bins, color, name)
    for axes, label in ((left, "share of elements in a bin"), (right, "share of elements with a larger error")):
        style(axes)
        axes.set_xscale("log")
        axes.set_xlabel(f"size of the error ({PER_DECADE} bins per factor of 10)", fontsize=NORMAL, color=INK)
        axes.set_ylabel(label, fontsize=NORMAL, color=INK)
        axes.grid(True, color=GRID, linewidth=0.7)
    left.set_ylim(bottom=0.0)
    right.set_yscale("log")
    left.legend(loc="upper left", frameon=False, fontsize=SMALL)
    save(figure, path)


def _draw_shares(axes: Any, counts: ErrorCounts, bins: slice, color: str, label: str) -> None:
    edges = EDGES[bins.start : bins.stop + 1]
    shares = counts.magnitudes[bins] / max(counts.n, 1)
    axes.stairs(shares, edges, color=color, alpha=0.18, fill=True, linewidth=0)
    axes.stairs(shares, edges, color=color, linewidth=1.5, label=label)
    axes.stairs(counts.negative[bins] / max(counts.n, 1), edges, color=color, linewidth=0.9, linestyle=(0, (2, 2)))


def _draw_tail(axes: Any, counts: ErrorCounts, bins: slice, color: str, label: str) -> None:
    magnitudes = counts.magnitudes[bins]
    if not magnitudes.any():
        return
    beyond = np.cumsum(magnitudes[::-1])[::-1] / max(counts.n, 1)
    last = int(np.flatnonzero(magnitudes)[-1]) + 1
    edges = EDGES[bins.start : bins.start + last]
    axes.plot(edges, beyond[:last], color=color, linewidth=1.6, label=label)
    axes.plot(edges[-1:], beyond[last - 1 : last], color=color, marker="o", markersize=4)
    axes.axhline(1.0 / max(counts.n, 1), color=FAINT, linewidth=0.7, linestyle=":")


def _label(name: str, counts: ErrorCounts) -> str:
    share = f"{100 * counts.zero / max(counts.n, 1):.3g} % exact"
    bad = f", {counts.nonfinite:,} not finite" if counts.nonfinite else ""
    return f"{name}: {share}{bad} (dashed: negative errors)"


def caption(source: Histogram) -> str:
    """What the picture shows in numbers: the medians of the errors that are not zero, and the largest."""
    parts = [f"n = {source.target.n:,}"]
    for name, counts in (("baseline", source.baseline), ("target", source.target)):
        if counts is not None and counts.magnitudes.any():
            at = np.cumsum(counts.magnitudes)
            median = EDGES[int(np.searchsorted(at, at[-1] / 2)) + 1]
            largest = EDGES[int(np.flatnonzero(counts.magnitudes)[-1]) + 1]
            parts.append(
                f"{name}: half of the errors below {number(float(median))}, all below {number(float(largest))}"
            )
    return "    ".join([*parts, f"{source.result.state.replace('_', ' ')}, {source.result.verdict}"])
