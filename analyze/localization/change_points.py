"""Change points of R over sites in dataflow order: steps that persist, spikes that return, drifts that grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..triples import FloatArray
from .segmentation import WeightedSums, boundaries, line_cost, place_interval, segment

STEP, SPIKE, DRIFT = "step", "spike", "drift"

#: Least dispersion of log R between faithful sites that is believed: R of a correct port differs by a few percent
#: from one kind of site to the next, and bit-identical neighbours must not make the noise vanish.
LEAST_DISPERSION = 0.05
#: Taken where there are too few sites to estimate it.
USUAL_DISPERSION = 0.1
_FEW_DIFFERENCES = 4
#: Median of the square of a standard normal variable.
_MEDIAN_CHI2 = 0.454936
#: A step that falls back within this many sites is a spike, if it loses this share of its rise in log R.
_SPIKE_SITES = 3
_SPIKE_RETURN = 0.75
#: A drift that begins within this many dispersions of the level before it has no step at its beginning.
_SMOOTH = 4.0


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """A place where log R changes.

    Attributes:
        kind: `step` (a new level, which persists), `spike` (gone after three sites at most) or `drift` (R grows or
            shrinks steadily).
        index: the first site on the new level; the first of a drift.
        low, high: first and last index that it may be with 95 % probability; first and last site of a drift.
        change: log of R after over R before: level against level, or from one end of a drift to the other.
        before: level of log R before it.
    """

    kind: str
    index: int
    low: int
    high: int
    change: float
    before: float


def change_points(values: FloatArray, spread: FloatArray, *, dispersion: float | None = None) -> list[ChangePoint]:
    """Find the changes of a signal exactly; see `segment`.

    Args:
        values: `float64[n]`, log R of the sites in dataflow order, finite.
        spread: `float64[n]`, standard error of each, 0 where unknown.
        dispersion: standard deviation between sites on one level, on top of `spread`; estimated by default.

    Returns:
        Changes in order. Of a spike only its rise (or fall) is listed, of a drift only its beginning.
    """
    if len(values) < 2:
        return []
    extra = dispersion_of(values, spread) if dispersion is None else dispersion
    weights = 1.0 / (spread**2 + extra**2)
    penalty = penalty_of(len(values))
    starts = segment(values, weights, penalty)
    sums = WeightedSums(values, weights)
    found: list[ChangePoint] = []
    edges = [0, *starts, len(values)]
    for first, last in _drifts(values, weights, edges, penalty):
        drift = _drift(values, weights, edges[first], edges[last])
        found.append(drift)
        level = sums.mean(edges[first - 1], edges[first]) if first else drift.before
        smooth = abs(drift.before - level) < _SMOOTH * extra
        starts = [start for start in starts if start not in edges[first + (not smooth) : last]]
    edges = [0, *starts, len(values)]
    place = 1
    while place < len(edges) - 1:
        change = _level_change(sums, edges, place)
        found.append(change)
        place += 2 if change.kind == SPIKE else 1
    return sorted(found, key=lambda change: change.index)


def penalty_of(n: int) -> float:
    """Cost of one change in a signal of n sites: 2 log n + 6.

    2 log n is the Schwarz criterion for one more level and its place (Yao, "Estimating the number of change-points
    via Schwarz' criterion", 1988), which is consistent but finds a change in up to a fifth of short signals without
    any; 6 more keep that below 5 % from 3 sites to 10,000 (`tests/test_change_points.py` simulates it).
    """
    return 2.0 * math.log(n) + 6.0


def dispersion_of(values: FloatArray, spread: FloatArray) -> float:
    """Standard deviation of sites on one level, beyond their own uncertainty, from differences of neighbours.

    Changes touch few differences, so the median ignores them: the dispersion d solves
    median((y[i+1] - y[i])^2 / (s[i]^2 + s[i+1]^2 + 2 d^2)) = 0.455, the median of chi-square with one degree of
    freedom. An estimate from m differences is raised by 1 + 3 / m: from few ones it is too small too often.
    """
    squares = np.diff(values) ** 2
    if len(squares) < _FEW_DIFFERENCES:
        return USUAL_DISPERSION
    own = spread[1:] ** 2 + spread[:-1] ** 2
    low, high = 0.0, float(np.sqrt(squares.max())) + LEAST_DISPERSION
    for _ in range(60):
        middle = (low + high) / 2
        if np.median(squares / (own + 2 * middle**2)) > _MEDIAN_CHI2:
            low = middle
        else:
            high = middle
    return max(high * (1.0 + 3.0 / len(squares)), LEAST_DISPERSION)


def _level_change(sums: WeightedSums, edges: Sequence[int], place: int) -> ChangePoint:
    """The change at `edges[place]`, between the pieces on both sides of it."""
    start, at, stop = edges[place - 1 : place + 2]
    low, high = place_interval(sums, start, stop, at)
    before, level = sums.mean(start, at), sums.mean(at, stop)
    kind = STEP
    if stop < sums.n and stop - at <= _SPIKE_SITES:
        back = level - sums.mean(stop, edges[place + 2])
        kind = SPIKE if back / (level - before) >= _SPIKE_RETURN else STEP
    return ChangePoint(kind, at, low, high, level - before, before)


def _drifts(values: FloatArray, weights: FloatArray, edges: Sequence[int], penalty: float) -> list[tuple[int, int]]:
    """Ranges of pieces that one straight line describes for less than their levels and changes cost.

    Neighbouring pieces are joined as long as their levels change in one direction, longest ranges first; a single
    piece is one too when a slope pays for itself.
    """
    sums = WeightedSums(values, weights)
    levels = [sums.mean(start, stop) for start, stop in boundaries(edges[1:-1], edges[-1])]
    ups = np.sign(np.diff(levels))
    taken: list[tuple[int, int]] = []
    first = 0
    while first < len(levels):
        last = first + 1
        while last < len(levels) and ups[last - 1] == ups[first]:
            last += 1
        lines = (
            stop for stop in range(last, first, -1) if _is_line(sums, values, weights, edges[first : stop + 1], penalty)
        )
        stop = next(lines, None)
        if stop is not None:
            taken.append((first, stop))
        first = first + 1 if stop is None else stop
    return taken


def _is_line(sums: WeightedSums, values: FloatArray, weights: FloatArray, edges: Sequence[int], penalty: float) -> bool:
    """Whether a line through the pieces beats their levels; one slope costs as much as one change."""
    start, stop = edges[0], edges[-1]
    if stop - start < 4 or len(edges) == 3:  # one change is a step: two levels say nothing about a slope
        return False
    steps = sum(float(sums.cost(a, b)) for a, b in pairwise(edges))
    return line_cost(values, weights, start, stop)[1] + penalty < steps + penalty * (len(edges) - 2)


def _drift(values: FloatArray, weights: FloatArray, start: int, stop: int) -> ChangePoint:
    slope = line_cost(values, weights, start, stop)[0]
    level = float(np.average(values[start:stop], weights=weights[start:stop]))
    change = slope * (stop - 1 - start)
    return ChangePoint(DRIFT, start, start, stop - 1, change, level - change / 2)
