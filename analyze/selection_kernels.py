"""The compiled passes of a selection: count values into ordered bins, collect or subdivide the wanted ones.

Bins and keys order float64 values by their bits; `selection.Binning` defines both.
"""

from __future__ import annotations

import numpy as np

from .compiled import MAGNITUDE, as_bits, compiled
from .triples import FloatArray, IntArray


@compiled
def count_bins(values: FloatArray, base: int, shift: int, counts: IntArray) -> None:
    """Count values into ordered bins (see `selection.Binning`)."""
    half = counts.shape[0] // 2
    inside = np.uint64(half - 2)
    for i in range(values.shape[0]):
        bits = as_bits(values[i])
        magnitude = bits & np.int64(MAGNITUDE)
        step = (magnitude >> shift) - base
        if not np.uint64(step - 1) < inside:  # rare: zero, and magnitudes that the bins do not resolve
            step = min(max(step, 1), half - 1) if magnitude != 0 else 0
        sign = bits >> np.int64(63)  # 0 or -1
        counts[np.uint64(half + ((step ^ sign) - sign))] += 1


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
def _is_wanted(value: float, shift: int, wanted: IntArray) -> int:
    """1 if the bit of the value's prefix is set."""
    prefix = np.uint64(as_bits(value)) >> np.uint64(shift)
    bit: int = (wanted[prefix >> np.uint64(6)] >> np.int64(prefix & np.uint64(63))) & np.int64(1)
    return bit


@compiled
def collect(values: FloatArray, shift: int, wanted: IntArray, lows: IntArray, highs: IntArray) -> int:
    """Move values with a wanted prefix that, if `lows` is not empty, lie in an interval of keys, to the front."""
    found = 0
    for i in range(values.shape[0]):  # every value is written: a branch that is rarely taken costs more
        value = values[i]
        values[found] = value
        found += _is_wanted(value, shift, wanted)
    kept = 0
    for i in range(found):
        value = values[i]
        if value != 0.0 and (lows.shape[0] == 0 or _slot(value, lows, highs) >= 0):
            values[kept] = value
            kept += 1
    return kept


@compiled
def subdivide(
    values: FloatArray,
    shift: int,
    wanted: IntArray,
    lows: IntArray,
    highs: IntArray,
    shifts: IntArray,
    counts: IntArray,
    smallest: IntArray,
    largest: IntArray,
) -> None:
    """Count values into the sub-bins of key intervals and track the extreme keys of every sub-bin."""
    for value in values:
        if not _is_wanted(value, shift, wanted):
            continue
        slot = _slot(value, lows, highs)
        if slot >= 0:
            key = _key(as_bits(value))
            part = (key - lows[slot]) >> shifts[slot]
            counts[slot, part] += 1
            smallest[slot, part] = min(smallest[slot, part], key)
            largest[slot, part] = max(largest[slot, part], key)
