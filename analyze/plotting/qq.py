"""The error distributions of one site: target against baseline, quantile by quantile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...store.trace import Trace
from ..quantiles import middle_scale, wasserstein
from .figure import INK, LARGE, NORMAL, SIGMA, new_figure, number, plain, save, words
from .qq_panels import draw_quantiles, draw_scatter
from .source import Compared, SiteResult, choose_site, compared, site_results

FloatArray = npt.NDArray[np.float64]
_SIZE = (12.5, 6.0)
_REASONS = {
    "exact": "Both errors are zero everywhere:\ntarget and baseline equal the reference bit for bit.",
    "nonfinite": "A value is NaN or infinite: the errors have no distribution.",
    "shape_mismatch": "Reference and target differ in shape: there are no errors to compare.",
}


@dataclass(frozen=True)
class Distributions:
    """The two error distributions of a site.

    Attributes:
        comparison: what is compared.
        result: the site, its R and state.
        n: elements compared.
        probability: float64[quantiles], ascending, within what `n` elements can resolve, and the extremes 0 and 1.
        baseline, target: float64[quantiles], in the tensor's own unit.
        sigma: scale of the baseline's error (`analyze.quantiles.middle_scale`, or the standard deviation where most
            errors are equal), in the tensor's own unit; 0 if it has no error.
        slope, intercept, w1, ks: see `analyze.quantiles.QQ`; None: undefined.
    """

    comparison: Compared
    result: SiteResult
    n: int
    probability: FloatArray
    baseline: FloatArray
    target: FloatArray
    sigma: float
    slope: float | None
    intercept: float | None
    w1: float | None
    ks: float | None

    @property
    def missing(self) -> str:
        """Why there is nothing to draw; empty if there is something."""
        if self.result.state in _REASONS:
            return _REASONS[self.result.state]
        if self.comparison.baseline is None:
            return "There is no baseline to compare the errors with."
        return "" if len(self.probability) else "The comparison stored no error quantiles for this site."


def plot_qq(trace: Trace, comparison: str, path: Path, *, site: tuple[str, str] | None = None) -> None:
    """Draw the error distributions of one site, or say in the picture why it has none.

    Left, target quantiles against baseline quantiles, with the diagonal (equal distributions) and the robust line
    (`qq_slope`, `qq_intercept`); right, both quantile functions over a normal probability axis, where the bulk and
    the tails are equally wide.

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
    result = choose_site(site_results(trace, source), source, *(site or ()))
    draw_qq(distributions(trace, source, result), path)


def distributions(trace: Trace, comparison: Compared, result: SiteResult) -> Distributions:
    """Read the error distributions of a site; empty ones where there are none."""
    key = [comparison.name, result.measurement]
    rows = trace.query(
        """SELECT probability, coalesce(baseline, 'NaN'::DOUBLE) AS baseline, target FROM error_quantiles
           WHERE comparison = ? AND measurement = ? AND target IS NOT NULL ORDER BY probability""",
        key,
    )
    numbers = trace.query(
        "SELECT n, qq_slope, qq_intercept, qq_w1, ks FROM measurements WHERE comparison = ? AND measurement = ?", key
    ).to_pylist()[0]
    probability, baseline, target = (np.asarray(column.to_numpy(), np.float64) for column in rows.columns)
    finite = {name: _number(value) for name, value in numbers.items() if name != "n"}
    n = int(numbers["n"])
    kept = (np.minimum(probability, 1.0 - probability) >= 0.5 / max(n, 1)) | (probability == 0.0) | (probability == 1.0)
    return Distributions(
        comparison,
        result,
        n,
        probability[kept],
        baseline[kept],
        target[kept],
        _sigma(baseline, target, finite["qq_w1"]),
        finite["qq_slope"],
        finite["qq_intercept"],
        finite["qq_w1"],
        finite["ks"],
    )


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _sigma(baseline: FloatArray, target: FloatArray, w1: float | None) -> float:
    """The scale that the QQ numbers are in units of; where the middle has no width, W1 tells what it was divided by."""
    if not len(baseline) or np.isnan(baseline).any() or not np.any(baseline):
        return 0.0
    return middle_scale(baseline) or (wasserstein(baseline, target) / w1 if w1 else 0.0)


def draw_qq(source: Distributions, path: Path) -> None:
    """Draw what `distributions` read."""
    figure = new_figure(*_SIZE)
    title = f"{plain(source.result.site, 80)} ({source.result.phase}): {plain(source.comparison.headline, 120)}"
    if source.missing:
        words(figure, title, source.missing)
        save(figure, path)
        return
    figure.suptitle(f"{title}\n{caption(source)}", fontsize=LARGE - 1, x=0.01, ha="left", color=INK, linespacing=1.5)
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.15])
    unit = _unit(source)
    draw_scatter(left, source, unit)
    draw_quantiles(right, source, unit)
    _label(left, right, source, unit)
    save(figure, path)


def _unit(source: Distributions) -> float:
    """What errors are divided by: the baseline's standard deviation, or the target's spread if that is 0."""
    spread = float(np.sqrt(np.mean(source.target**2)))
    return source.sigma or spread or 1.0


def caption(source: Distributions) -> str:
    """The numbers of a site in one line."""
    result = source.result
    interval = f" [{number(result.low)}, {number(result.high)}]" if result.low is not None else ""
    return "    ".join(
        (
            f"R = {number(result.value)}{interval}",
            f"W1 = {_in_sigma(source.w1)}",
            f"KS = {number(source.ks)}",
            f"slope {number(source.slope)}, intercept {_in_sigma(source.intercept)}",
            f"n = {source.n:,}",
            f"{result.state.replace('_', ' ')}, {result.verdict}",
        )
    )


def _in_sigma(value: float | None) -> str:
    return number(value) if value is None else f"{number(value)} {SIGMA}"


def _label(left: Any, right: Any, source: Distributions, unit: float) -> None:
    names = [plain(name or "", 30) for name in (source.comparison.baseline, source.comparison.target)]
    meaning = f"{SIGMA} = {number(unit)}" if source.sigma else f"s = {number(unit)}, target's spread"
    letter = SIGMA if source.sigma else "s"
    left.set_xlabel(f"error of {names[0]} / {letter}   ({meaning})", fontsize=NORMAL, color=INK)
    left.set_ylabel(f"error of {names[1]} / {letter}", fontsize=NORMAL, color=INK)
    right.set_xlabel("share of elements with a smaller error (normal axis)", fontsize=NORMAL, color=INK)
    right.set_ylabel(f"error / {letter}", fontsize=NORMAL, color=INK)
    bent = f"  (linear within ±1 {letter}, logarithmic beyond)" if left.get_yscale() != "linear" else ""
    left.set_title(f"quantile against quantile{bent}", fontsize=NORMAL, loc="left", color=INK)
    right.set_title("quantile functions, bulk and tails", fontsize=NORMAL, loc="left", color=INK)
