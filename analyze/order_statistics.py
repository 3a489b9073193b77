"""Exact quantiles of one stored tensor in bounded memory, whatever its size and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .triples import AnyArray, FloatArray

#: Elements that are widened to float64 at a time.
_PIECE = 1 << 20
_SIGN = 1 << 63


def quantile(values: AnyArray, q: float) -> float:
    """The quantile as numpy's `linear` method defines it; NaN if an element is NaN.

    Args:
        values: at least one element, 1-D, of a real dtype.
        q: probability from 0 to 1.
    """
    if any(np.isnan(piece).any() for piece in _pieces(values)):
        return float("nan")
    rank = q * (values.size - 1)
    low, weight = int(rank), rank - int(rank)
    below = _element_of_rank(values, low)
    above = _element_of_rank(values, low + 1) if weight else below
    return below if below == above else below + weight * (above - below)


def _pieces(values: AnyArray) -> Iterator[FloatArray]:
    for at in range(0, values.size, _PIECE):
        yield values[at : at + _PIECE].astype(np.float64)


def _element_of_rank(values: AnyArray, rank: int) -> float:
    """By sorting what is small, else by radix selection: four passes that settle 16 bits each of its float64 key."""
    if values.size <= _PIECE:
        return float(np.partition(values.astype(np.float64), rank)[rank])
    key = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for piece in _pieces(values):
            keys = _keys(piece)
            if shift < 48:
                keys = keys[keys >> np.uint64(shift + 16) == np.uint64(key)]
            digits = (keys >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.intp), minlength=len(counts))
        up_to = np.cumsum(counts)
        digit = int(np.searchsorted(up_to, rank, side="right"))
        rank -= int(up_to[digit] - counts[digit])
        key = key << 16 | digit
    bits = key ^ _SIGN if key & _SIGN else key ^ (2 * _SIGN - 1)
    return float(np.uint64(bits).view(np.float64))


def _keys(values: FloatArray) -> npt.NDArray[np.uint64]:
    """Unsigned integers in the order of the floats: negative ones with all bits flipped, the others with the sign."""
    bits = values.view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits ^ np.uint64(_SIGN))
