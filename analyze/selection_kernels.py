"""The compiled passes of a selection: count values into ordered bins, collect or subdivide the wanted ones.

Bins and keys order float64 values by their bits; `selection.Binning` defines both.
"""

from __future__ import annotations

import numpy as np

from .compiled import MAGNITUDE, as_bits, compiled
from .triples import ByteArray, FloatArray, IntArray

_BLOCK = 1024  # values binned at a time


@compiled
def _bins(values: FloatArray, start: int, stop: int, base: int, shift: int, half: int, out: IntArray) -> None:
    """Bin of every value `start .. stop`; a loop of its own, since counting would keep it from vectorising."""
    source = values[start:stop]
    for i in range(stop - start):
        bits = as_bits(source[i])
        magnitude = bits & np.int64(MAGNITUDE)
        step = min(max((magnitude >> shift) - base, 1), half - 1)
        step = step if magnitude != 0 else 0
        out[i] = half + step if bits >= 0 else half - step


@compiled
def count_bins(values: FloatArray, base: int, shift: int, counts: IntArray) -> None:
    """Count values into ordered bins (see `selection.Binning`)."""
    bins = np.empty(_BLOCK, np.int64)
    for start in range(0, values.shape[0], _BLOCK):
        stop = min(start + _BLOCK, values.shape[0])
        _bins(values, start, stop, base, shift, counts.shape[0] // 2, bins)
        for i in range(stop - start):
            counts[bins[i]] += 1


@compiled
def _key(bits: int) -> int:
    return bits if bits >= 0 else -(bits & np.int64(MAGNITUDE))


@compiled
def _slot(value: float, lows: IntArray, highs: IntArray) -> int:
    """The interval of keys that holds a value, or -1."""
    key = _key(as_bits(value))
    slot = np.searchsorted(lows, key, side="right") - 1
    return slot if slot >= 0 and key < highs[slot] else -1


@compiled
def collect(values: FloatArray, base: int, shift: int, wanted: ByteArray, lows: IntArray, highs: IntArray) -> int:
    """Move the values that lie in wanted bins and, if `lows` is not empty, in an interval of keys, to the front."""
    bins = np.empty(_BLOCK, np.int64)
    kept = 0
    for start in range(0, values.shape[0], _BLOCK):
        stop = min(start + _BLOCK, values.shape[0])
        _bins(values, start, stop, base, shift, wanted.shape[0] // 2, bins)
        if lows.shape[0] == 0:
            for i in range(stop - start):
                if wanted[bins[i]]:
                    values[kept] = values[start + i]
                    kept += 1
        else:
            for i in range(stop - start):
                if wanted[bins[i]] and _slot(values[start + i], lows, highs) >= 0:
                    values[kept] = values[start + i]
                    kept += 1
    return kept


@compiled
def subdivide(
    values: FloatArray,
    base: int,
    shift: int,
    wanted: ByteArray,
    lows: IntArray,
    highs: IntArray,
    shifts: IntArray,
    counts: IntArray,
    smallest: IntArray,
    largest: IntArray,
) -> None:
    """Count values into the sub-bins of key intervals and track the extreme keys of every sub-bin."""
    bins = np.empty(1, np.int64)
    for i in range(values.shape[0]):
        _bins(values, i, i + 1, base, shift, wanted.shape[0] // 2, bins)
        if not wanted[bins[0]]:
            continue
        slot = _slot(values[i], lows, highs)
        if slot >= 0:
            key = _key(as_bits(values[i]))
            part = (key - lows[slot]) >> shifts[slot]
            counts[slot, part] += 1
            smallest[slot, part] = min(smallest[slot, part], key)
            largest[slot, part] = max(largest[slot, part], key)
