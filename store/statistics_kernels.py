"""Compiled loops behind `statistics`: one pass over float32 or bfloat16 bits."""

from __future__ import annotations

from typing import Any, TypeAlias

import numba
import numpy as np

#: shift, sum(x - shift), sum((x - shift)^2), min, max, absmax, n_nan, n_inf, n_zero; sums over finite elements.
Sums: TypeAlias = tuple[float, float, float, float, float, float, int, int, int]

_BLOCK = 4096
_INFINITY = 0x7F800000
_SUM_FLAGS = {"reassoc", "contract", "nsz"}


@numba.njit(cache=True, nogil=True, fastmath=_SUM_FLAGS)  # type: ignore[untyped-decorator]
def _block_sums(values: Any, shift: float) -> Any:
    total = 0.0
    squares = 0.0
    for i in range(values.size):
        x = np.float64(values[i]) - shift
        total += x
        squares += x * x
    return total, squares


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _block_order(bits: Any) -> Any:
    # Numba widens integer arithmetic to 64 bits; casting every result back is what lets the loop vectorise.
    low = np.int32(0x7FFFFFFF)
    high = np.int32(-0x80000000)
    largest = np.int32(0)
    zeros = np.int32(0)
    for i in range(bits.size):
        raw = bits[i]
        magnitude = np.int32(raw & np.int32(0x7FFFFFFF))
        ordered = np.int32(raw ^ np.int32(np.int32(raw >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low = np.int32(min(low, ordered))
        high = np.int32(max(high, ordered))
        largest = np.int32(max(largest, magnitude))
        zeros = np.int32(zeros + np.int32(magnitude == 0))
    return low, high, largest, zeros


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _block_order_of_halves(bits: Any) -> Any:
    """`_block_order` of a block of bfloat16 bits (int16), widened to float32 bits at the end."""
    low = np.int16(0x7FFF)
    high = np.int16(-0x8000)
    largest = np.int16(0)
    zeros = np.int16(0)
    for i in range(bits.size):
        raw = bits[i]
        magnitude = np.int16(raw & np.int16(0x7FFF))
        ordered = np.int16(raw ^ np.int16(np.int16(raw >> np.int16(15)) & np.int16(0x7FFF)))
        low = np.int16(min(low, ordered))
        high = np.int16(max(high, ordered))
        largest = np.int16(max(largest, magnitude))
        zeros = np.int16(zeros + np.int16(magnitude == 0))
    return _widen_order(low), _widen_order(high), np.int32(np.int32(largest) << 16), np.int32(zeros)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _widen_order(ordered: Any) -> Any:
    """Ordered image of a bfloat16 to the ordered image of the same float32: the low bits follow the sign."""
    wide = np.int32(np.int32(ordered) << 16)
    return np.int32(wide | 0xFFFF) if ordered < 0 else wide


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _widen(halves: Any, wide: Any) -> None:
    for i in range(halves.size):
        wide[i] = np.int32(halves[i]) << np.int32(16)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _block_with_nonfinite(values: Any, bits: Any, shift: float, state: Any, counts: Any) -> Any:
    """Element by element: the block holds a NaN or an infinity. Updates state (low, high, largest) and counts."""
    total = 0.0
    squares = 0.0
    for i in range(values.size):
        magnitude = bits[i] & np.int32(0x7FFFFFFF)
        if magnitude > _INFINITY:
            counts[0] += 1
        elif magnitude == _INFINITY:
            counts[1] += 1
        else:
            ordered = bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
            state[0] = min(state[0], ordered)
            state[1] = max(state[1], ordered)
            state[2] = max(state[2], magnitude)
            counts[2] += magnitude == 0
            x = np.float64(values[i]) - shift
            total += x
            squares += x * x
    return total, squares


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first_finite(values: Any) -> Any:
    for value in values:
        if np.isfinite(value):
            return np.float64(value)
    return 0.0


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _accumulate(values: Any, bits: Any, order: Any, shift: float, sums: Any, state: Any, counts: Any) -> None:
    low, high, largest, zeros = order
    if largest < _INFINITY:
        total, squares = _block_sums(values, shift)
        state[0] = min(state[0], low)
        state[1] = max(state[1], high)
        state[2] = max(state[2], largest)
        counts[2] += zeros
    else:
        total, squares = _block_with_nonfinite(values, bits, shift, state, counts)
    sums[0] += total
    sums[1] += squares


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _finish(shift: float, sums: Any, state: Any, counts: Any) -> Any:
    bits = np.empty(3, np.int32)
    for i in range(2):
        bits[i] = state[i] ^ ((state[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    bits[2] = state[2]
    ends = bits.view(np.float32)
    low, high, largest = np.float64(ends[0]), np.float64(ends[1]), np.float64(ends[2])
    return shift, sums[0], sums[1], low, high, largest, counts[0], counts[1], counts[2]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _new_state() -> Any:
    return np.array([0x7FFFFFFF, -0x80000000, 0], np.int32)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def scan_float32(values: Any, bits: Any) -> Any:
    """`Sums` of a flat float32 array; `bits` is the same memory as int32."""
    shift = _first_finite(values)
    sums, state, counts = np.zeros(2), _new_state(), np.zeros(3, np.int64)
    for start in range(0, values.size, _BLOCK):
        stop = min(start + _BLOCK, values.size)
        order = _block_order(bits[start:stop])
        _accumulate(values[start:stop], bits[start:stop], order, shift, sums, state, counts)
    return _finish(shift, sums, state, counts)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def scan_bfloat16(halves: Any) -> Any:
    """`Sums` of a flat bfloat16 array given as int16: each block is widened to float32 in cache."""
    wide = np.empty(_BLOCK, np.int32)
    values = wide.view(np.float32)
    sums, state, counts = np.zeros(2), _new_state(), np.zeros(3, np.int64)
    shift = 0.0
    for start in range(0, halves.size, _BLOCK):
        block = halves[start : start + _BLOCK]
        size = block.size
        _widen(block, wide)
        if start == 0:
            shift = _first_finite(values[:size])
        _accumulate(values[:size], wide[:size], _block_order_of_halves(block), shift, sums, state, counts)
    return _finish(shift, sums, state, counts)
