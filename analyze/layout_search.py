"""Finding one tensor's features among another's by their values, and the rearrangement between the two.

Features are columns over a few sampled positions. A column's nearest neighbour among the other tensor's columns tells
where it went; only rearrangements that a program would make are believed: runs of neighbouring features that stay
together, or a transposition of factors (heads and head dimension, interleaved pairs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from .ranks import Columns

Rows = npt.NDArray[np.float64]
_Index = npt.NDArray[np.int64]

#: With fewer sampled positions, columns are not distinctive enough to be recognised.
MIN_POSITIONS = 4
#: Equal columns among which the first is taken (heads that were repeated).
_NEIGHBOURS = 8
_PROBES = 16


@dataclass(frozen=True)
class Found:
    """Features of `wide` that are the features of `narrow`.

    Attributes:
        columns: ranges of wide features in the order of the narrow ones; None when both agree as they are.
        residual: relative L2 difference that remains.
    """

    columns: Columns | None
    residual: float


def difference(reference: Rows, other: Rows) -> float:
    """Relative L2 difference of two arrays of one shape, NaN when a value is not finite."""
    return relative(float(np.linalg.norm(other - reference)), float(np.linalg.norm(reference)))


def relative(error: float, norm: float) -> float:
    """An error over a norm: 0 for 0 / 0, infinite when only the norm is 0."""
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / norm


def find_features(narrow: Rows, wide: Rows, tolerance: float, *, in_order: bool = False) -> Found | None:
    """Where the features of one tensor are among those of another, if anywhere.

    Args:
        narrow: `[positions, n]`.
        wide: `[positions, m]`, m >= n, the same positions.
        tolerance: relative L2 difference that the values may have.
        in_order: only accept features that keep their order (parts may be missing in between).
    """
    if narrow.shape == wide.shape:
        residual = difference(narrow, wide)
        if residual <= tolerance:
            return Found(None, residual)
    usable = len(narrow) >= MIN_POSITIONS and np.isfinite(narrow).all() and np.isfinite(wide).all()
    if not usable or narrow.shape[1] > wide.shape[1]:
        return None
    tree = cKDTree(wide.T)
    noise = tolerance * float(np.linalg.norm(narrow)) / float(np.sqrt(narrow.shape[1]))
    probes = np.linspace(0, narrow.shape[1] - 1, min(_PROBES, narrow.shape[1])).astype(np.int64)
    if difference(narrow[:, probes], wide[:, _nearest(tree, narrow[:, probes], noise)]) > 2 * tolerance:
        return None
    index = _nearest(tree, narrow, noise)
    residual = difference(narrow, wide[:, index])
    if residual > tolerance or len(np.unique(index)) < len(index):
        return None
    columns = as_ranges(index)
    if in_order and bool((np.diff(index) <= 0).any()):
        return None
    if len(columns) > max(1, len(index) // 2) and not _is_transposition(index, wide.shape[1]):
        return None
    return Found(columns, residual)


def _nearest(tree: cKDTree, columns: Rows, noise: float) -> _Index:
    """For every column, the first of the tree's columns that is as near as its nearest, up to the noise."""
    k = min(_NEIGHBOURS, tree.n)
    distances, neighbours = tree.query(columns.T, k=k)
    distances, neighbours = distances.reshape(-1, k), neighbours.reshape(-1, k)
    near = distances <= distances[:, :1] + noise
    first: _Index = np.where(near, neighbours, tree.n).min(axis=1).astype(np.int64)
    return first


def as_ranges(index: _Index) -> Columns:
    """Consecutive indices as ranges `(start, stop)`."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    starts = index[np.concatenate([[0], breaks])]
    stops = index[np.concatenate([breaks - 1, [len(index) - 1]])] + 1
    return tuple((int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def _is_transposition(index: _Index, size: int) -> bool:
    """Whether the indices are those of `[a, b, c]` read as `[a, c, b]`."""
    if len(index) != size:
        return False
    plain = np.arange(size)
    return any(
        bool((plain.reshape(a, b, size // (a * b)).swapaxes(1, 2).reshape(-1) == index).all())
        for a in _divisors(size)
        for b in _divisors(size // a)
    )


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(1, number + 1) if number % d == 0)
