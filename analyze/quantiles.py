"""Error quantiles on one fixed probability grid, and the QQ numbers that follow from two quantile vectors.

Everything here is a pure function of `float64[probabilities]` vectors on `PROBABILITIES`, so that whoever holds
the stored quantiles (SQL, a report) can recompute every number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .triples import FloatArray, IntArray


def _grid() -> FloatArray:
    tail = [digit * 10.0**-decade for decade in (6, 5, 4, 3) for digit in (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)]
    lower = [0.0, *(round(p, 7) for p in tail)]
    centre = [percent / 100 for percent in range(1, 100)]
    upper = [round(1.0 - p, 7) for p in reversed(lower)]
    return np.array([*lower, *centre, *upper])


PROBABILITIES: FloatArray = _grid()
"""149 probabilities, symmetric about 1/2, from 0 to 1.

Whole percents in between: an empirical distribution function is then known to 0.01 everywhere. Below 1 % and
above 99 %, six per decade down to 1e-6: errors of a wrong port (a clipped outlier channel, an overflow) live in
the tails, and 1e-6 is still the 100th largest of 1e8 elements. 0 and 1 are the extremes themselves. All are
short decimals, so that they can be named in a query.
"""
PROBABILITIES.setflags(write=False)

_CENTRE = (PROBABILITIES >= 0.01) & (PROBABILITIES <= 0.99)
#: A normal variable is below -0.9945 sigma with probability 0.16.
_MIDDLE, _MIDDLE_SIGMAS = 0.16, 0.994458
_PAIRS = np.triu_indices(int(_CENTRE.sum()), 1)


def ranks_of(count: int) -> tuple[IntArray, IntArray, FloatArray]:
    """Ranks and weight that make up each grid quantile of `count` values: numpy's 'linear' definition."""
    position = PROBABILITIES * (count - 1)
    low = np.floor(position).astype(np.int64)
    return low, np.minimum(low + 1, count - 1), position - low


def interpolate(low: FloatArray, high: FloatArray, weight: FloatArray) -> FloatArray:
    """Quantiles between two order statistics, rounded the way numpy.quantile rounds."""
    step = high - low
    return np.where(weight < 0.5, low + step * weight, high - step * (1.0 - weight))


def quantiles_of_sorted(values: FloatArray) -> FloatArray:
    """Grid quantiles of sorted values; NaN when there are none."""
    if len(values) == 0:
        return np.full(len(PROBABILITIES), np.nan)
    low, high, weight = ranks_of(len(values))
    return interpolate(values[low], values[high], weight)


def ratio(numerator: float, denominator: float) -> float:
    """A quotient that says what it is: inf for x / 0, NaN for 0 / 0 (and whenever either is NaN)."""
    if denominator == 0.0:
        return float("nan") if numerator == 0.0 or numerator != numerator else float(np.copysign(np.inf, numerator))
    return numerator / denominator


@dataclass(frozen=True, slots=True)
class QQ:
    """How the target's error distribution differs from the baseline's; all numbers are dimensionless.

    slope, intercept: the robust line through the QQ plot (see `qq_numbers`); 1 and 0 for equal distributions.
    w1: Wasserstein-1 distance over the scale of the baseline's error (see `middle_scale`).
    ks: Kolmogorov-Smirnov distance.
    """

    slope: float
    intercept: float
    w1: float
    ks: float


def qq_numbers(baseline: FloatArray, target: FloatArray, baseline_std: float) -> QQ:
    """QQ numbers from quantiles of the two errors on `PROBABILITIES`.

    - slope: Theil-Sen (Sen, "Estimates of the Regression Coefficient Based on Kendall's Tau", 1968): the median
      of (T_j - T_i) / (B_j - B_i) over all pairs i < j of the whole percents 1..99 with B_i != B_j. The tails are
      left out: the slope is the ratio of scales of the bulk, whatever the outliers do. NaN when all B are equal.
    - intercept: median over the same percents of T - slope * B, in units of the baseline's scale.
    - w1: the trapezoid of |T(p) - B(p)| over the whole grid, over the same scale.
    - ks: see `kolmogorov_smirnov`.

    The scale is `middle_scale`, or `baseline_std` where that is zero (most errors are exactly equal): one outlier of
    1000 standard deviations among 1024 errors would raise the standard deviation, and with it hide a threefold
    inflation of all the others. A zero scale gives inf (NaN for 0 / 0).
    """
    if np.isnan(baseline).any() or np.isnan(target).any():
        return QQ(np.nan, np.nan, np.nan, np.nan)
    scale = middle_scale(baseline) or baseline_std
    b, t = baseline[_CENTRE], target[_CENTRE]
    first, second = _PAIRS
    run = b[second] - b[first]
    distinct = run > 0.0
    slope = intercept = float("nan")
    if distinct.any():
        rise = t[second] - t[first]
        with np.errstate(over="ignore", invalid="ignore"):  # a slope beyond float64 is inf, its intercept NaN
            slope = float(np.median(rise[distinct] / run[distinct]))
            intercept = ratio(float(np.median(t - slope * b)), scale)
    return QQ(slope, intercept, ratio(wasserstein(baseline, target), scale), kolmogorov_smirnov(baseline, target))


def middle_scale(quantiles: FloatArray) -> float:
    """Half the distance of the 16th from the 84th percentile, over 0.9945: the sigma of a normal with that middle."""
    low, high = np.searchsorted(PROBABILITIES, [_MIDDLE, 1.0 - _MIDDLE])
    return float(quantiles[high] - quantiles[low]) / (2 * _MIDDLE_SIGMAS)


def wasserstein(a: FloatArray, b: FloatArray) -> float:
    """Wasserstein-1 = integral of |Q_a(p) - Q_b(p)| dp over [0, 1], by the trapezoid rule on the grid."""
    gap = np.abs(a - b)
    return float(((gap[1:] + gap[:-1]) / 2 * np.diff(PROBABILITIES)).sum())


def kolmogorov_smirnov(a: FloatArray, b: FloatArray) -> float:
    """Largest distance between two distribution functions known by their quantiles on the grid.

    Between grid points a distribution function is a straight line; where quantiles repeat it jumps. At each of
    the 298 quantile values x, F_a is compared with F_b just below x and just above x. The grid limits the
    resolution to 0.01.
    """
    x = np.concatenate([a, b])
    return float(max(np.abs(_cdf(a, x, side) - _cdf(b, x, side)).max() for side in ("left", "right")))


def _cdf(quantiles: FloatArray, x: FloatArray, side: str) -> FloatArray:
    """F(x-) for side 'left', F(x) for 'right'."""
    after = np.searchsorted(quantiles, x, side="left" if side == "left" else "right")
    high = np.clip(after, 1, len(quantiles) - 1)
    low = high - 1
    width = quantiles[high] - quantiles[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.where(width > 0, (x - quantiles[low]) / width, 0.0)
    value = PROBABILITIES[low] + inside * (PROBABILITIES[high] - PROBABILITIES[low])
    return np.where(after == 0, 0.0, np.where(after == len(quantiles), 1.0, value))
