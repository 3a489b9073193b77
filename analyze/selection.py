"""Exact order statistics of streams that do not fit in memory.

First pass: count every value into 2^15 ordered bins, prefixes of the float64 bit pattern. The bins that hold the
wanted ranks are then read again: their values are collected and sorted if they are few, otherwise the bins are
subdivided and the loop goes on. Zero is a bin of its own, and a sub-bin whose values are all equal is settled
without collecting, so masks, ReLU zeros and integer errors cost no memory. At most `COLLECT_LIMIT` values are
held, whatever the data.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from .quantiles import interpolate, ranks_of
from .triples import FloatArray, IntArray

HELD = 1 << 16
"""Values up to this number are simply sorted."""

COLLECT_LIMIT = 3 << 20
"""Values collected at a time and side (25 MB)."""

_MANTISSA = 9  # bits kept below the exponent: 1 to 2 % of a bell-shaped sample falls into the bins to collect
_OCTAVES = 32  # powers of two resolved, 24 below the first chunk's maximum; beyond, the outermost bins catch all
_SHIFT = 52 - _MANTISSA
_BINS = 2 * _OCTAVES << _MANTISSA
_PARTS = 2048
_KEY_END = 0x7FF0_0000_0000_0001  # one past the key of infinity


class InputChangedError(RuntimeError):
    """The values of a second pass are not those of the first."""


class Binning:
    """Which magnitudes the bins resolve: fixed by the first chunk that is counted, then shared by all counts.

    Bin `half` holds zero; `half + k` and `half - k` hold the magnitudes whose bits, shifted, are `base + k`;
    base is at least 0, so that shifted bits up to it, and zero, are known by a difference below 1.
    """

    def __init__(self) -> None:
        self._base: int | None = None
        self._lock = threading.Lock()

    def base(self, values: FloatArray | None = None) -> int:
        with self._lock:
            if self._base is None:
                top = 0.0 if values is None or len(values) == 0 else float(np.abs(values).max())
                octave = int(np.frexp(top)[1]) if 0.0 < top < np.inf else 0
                self._base = max((octave - _OCTAVES * 3 // 4 + 1023) * (1 << _MANTISSA) - 1, 0)
            return self._base

    def keys(self, bins: IntArray) -> tuple[IntArray, IntArray]:
        """Lows and highs of the half-open intervals of ordered keys that bins cover."""
        half = _BINS // 2
        steps = np.abs(bins - half)
        prefixes = np.minimum(self.base() + steps, _KEY_END >> _SHIFT)
        lows = np.where(steps <= 1, steps, np.maximum(prefixes << _SHIFT, 1))
        highs = np.where(steps == half - 1, _KEY_END, np.clip(prefixes + 1 << _SHIFT, 2, _KEY_END))
        highs = np.where(steps == 0, 1, highs)
        positive = bins >= half
        return np.where(positive, lows, 1 - highs), np.where(positive, highs, 1 - lows)


@dataclass
class Tally:
    """The distribution of one side's errors: the values themselves while they are few, counts beyond."""

    binning: Binning
    held: list[FloatArray] = field(default_factory=list)
    n_held: int = 0
    counts: IntArray | None = None

    def hold(self, values: FloatArray) -> None:
        """Take in some values; their array may change afterwards."""
        if self.counts is not None:
            self.count(values)
            return
        self.held.append(values.copy())
        self.n_held += len(values)
        if self.n_held > HELD:
            self._spill()

    def count(self, values: FloatArray) -> None:
        from .selection_kernels import count_bins

        if self.counts is None:
            self.counts = np.zeros(_BINS, np.int64)
        count_bins(values, self.binning.base(values), _SHIFT, self.counts)

    def absorb(self, other: Tally) -> None:
        """Take over all that another tally holds; the other must not be used any more."""
        if other.counts is not None:
            if self.counts is None:
                self.counts = other.counts
            else:
                self.counts += other.counts
        for values in other.held:
            self.hold(values)

    def settle(self) -> FloatArray | None:
        """All values, sorted, if they were few; None if they were counted."""
        if self.counts is None:
            return np.sort(np.concatenate([np.zeros(0), *self.held]))
        self._spill()
        return None

    def _spill(self) -> None:
        for values in self.held:
            self.count(values)
        self.held, self.n_held = [], 0


class Selection:
    """Finds the grid quantiles of a counted distribution in further passes over the same values.

    While `pending`: feed every value through `take` (from any thread, in any order), then call `end_pass`.
    """

    def __init__(self, tally: Tally) -> None:
        if tally.counts is None:
            raise ValueError("a selection starts from counts; small tallies are sorted")
        self._low_rank, self._high_rank, self._weight = ranks_of(int(tally.counts.sum()))
        self._ranks = np.unique(np.concatenate([self._low_rank, self._high_rank]))
        ends = np.cumsum(tally.counts)
        bins = np.unique(np.searchsorted(ends, self._ranks, side="right"))
        self._lows, self._highs = tally.binning.keys(bins)
        self._sizes: IntArray = tally.counts[bins]
        self._before: IntArray = ends[bins] - self._sizes
        self._wanted: IntArray = _prefix_bits(self._lows, self._highs)
        self._refined = False
        self._mode = "done"
        self._parts: IntArray = np.zeros((0, _PARTS), np.int64)
        self._lock = threading.Lock()
        self._collected: list[FloatArray] = []
        self._values: FloatArray = np.zeros(0)
        self._plan()

    @property
    def pending(self) -> bool:
        return self._mode != "done"

    def take(self, values: FloatArray) -> None:
        """Take in some of the values; their array is used as working memory."""
        from .selection_kernels import collect, subdivide

        if self._mode == "collect":
            lows = self._lows[self._open] if self._refined else self._lows[:0]
            highs = self._highs[self._open]
            kept = collect(values, _SHIFT, self._wanted, lows, highs)
            self._collected.append(values[:kept].copy())
        elif self._mode == "subdivide":
            lows, highs = self._lows[self._open], self._highs[self._open]
            with self._lock:
                subdivide(
                    values, _SHIFT, self._wanted, lows, highs, self._part_shifts,
                    self._parts, self._smallest, self._largest,
                )  # fmt: skip

    def end_pass(self) -> None:
        """Draw the conclusions of a pass.

        Raises:
            InputChangedError: the pass did not bring the values that were counted.
        """
        expected = int(self._sizes[self._open].sum())
        if self._mode == "collect":
            self._values = np.sort(np.concatenate([np.zeros(0), *self._collected]))
            self._collected = []
            found = len(self._values)
        else:
            found = int(self._parts.sum())
        if found != expected:
            raise InputChangedError(
                f"{expected} values were counted but {found} came back: the tensors changed while being read, "
                "or their iterable does not return the same tensors twice"
            )
        if self._mode == "collect":
            self._mode = "done"
        else:
            self._refine()
            self._plan()

    def quantiles(self) -> FloatArray:
        """Grid quantiles, `float64[probabilities]`."""
        slots = np.searchsorted(self._before, self._ranks, side="right") - 1
        starts = np.cumsum(np.where(self._open, self._sizes, 0)) - np.where(self._open, self._sizes, 0)
        values = _decode(self._lows)[slots]
        inside = self._open[slots]
        values[inside] = self._values[(starts[slots] + self._ranks - self._before[slots])[inside]]
        low = values[np.searchsorted(self._ranks, self._low_rank)]
        high = values[np.searchsorted(self._ranks, self._high_rank)]
        return interpolate(low, high, self._weight)

    def _plan(self) -> None:
        self._open = self._highs - self._lows > 1
        total = int(self._sizes[self._open].sum())
        self._mode = "done" if total == 0 else "collect" if total <= COLLECT_LIMIT else "subdivide"
        if self._mode == "subdivide":
            widths = (self._highs - self._lows)[self._open]
            bits = np.array([max(int(width - 1).bit_length() - 11, 0) for width in widths])
            self._part_shifts = bits.astype(np.int64)
            shape = (len(widths), _PARTS)
            self._parts = np.zeros(shape, np.int64)
            self._smallest = np.full(shape, np.iinfo(np.int64).max)
            self._largest = np.full(shape, np.iinfo(np.int64).min)

    def _refine(self) -> None:
        """Replace every open interval by those of its parts that hold a wanted rank."""
        kept = ~self._open
        found = [np.stack([self._lows, self._highs, self._sizes, self._before])[:, kept]]
        for slot, whole in enumerate(np.flatnonzero(self._open)):
            ends = self._before[whole] + np.cumsum(self._parts[slot])
            inside = (self._ranks >= self._before[whole]) & (self._ranks < ends[-1])
            parts = np.unique(np.searchsorted(ends, self._ranks[inside], side="right"))
            sizes = self._parts[slot, parts]
            lows, highs = self._smallest[slot, parts], self._largest[slot, parts] + 1
            found.append(np.stack([lows, highs, sizes, ends[parts] - sizes]))
        merged = np.concatenate(found, axis=1)
        merged = merged[:, np.argsort(merged[3], kind="stable")]
        self._lows, self._highs, self._sizes, self._before = (np.ascontiguousarray(line) for line in merged)
        self._refined = True


def _prefix_bits(lows: IntArray, highs: IntArray) -> IntArray:
    """A bit per prefix, `int64[prefixes / 64]`: 1 where a value whose bits start so lies in an interval of keys.

    Zero, an interval of its own, is left out.
    """
    negative = lows < 0
    first = np.where(negative, 1 - highs, lows) >> _SHIFT
    last = np.where(negative, -lows, highs - 1) >> _SHIFT
    prefixes = first[highs != 1] + (negative[highs != 1].astype(np.int64) << (63 - _SHIFT))
    more = (last - first)[highs != 1]
    prefixes = np.repeat(prefixes, more + 1) + _ramps(more + 1)
    bits = np.zeros(1 << (64 - _SHIFT - 6), np.int64)
    np.bitwise_or.at(bits, prefixes >> 6, np.int64(1) << (prefixes & 63))
    return bits


def _ramps(lengths: IntArray) -> IntArray:
    """`0 .. n - 1` for every length n, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(ends - lengths, lengths)


def _decode(keys: IntArray) -> FloatArray:
    magnitudes = np.abs(keys).view(np.float64)
    return np.where(keys < 0, -magnitudes, magnitudes)
