"""Dims: the axes of a tensor as text.

A dims text names each axis in order, separated by spaces. Axis `b` is the batch, `s` the token positions; the
other names are free (`h` hidden, `n` heads, `d` head dimension, `e` experts, `v` vocabulary, ...).

    b s h            plain
    b s h[tp]        sharded over the tensor-parallel group along h
    b s n[tp/2] d    tp/2 distinct parts along n, each held by 2 consecutive ranks (replicated KV heads)
    b s h{tp:sum}    every rank holds a partial sum
    (b s) e          several axes flattened into one, outermost first
    b 1 v            an axis of length one that is not a token axis

An empty text means that nothing is known about the axes: the tensor is compared whole.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

_AXIS = re.compile(
    r"\s*(?:\((?P<group>[a-z0-9 ]+)\)|(?P<name>[a-z][a-z0-9_]*|1))"
    r"(?:\[(?P<shard>[a-z]+)(?:/(?P<copies>[1-9][0-9]*))?\])?(?:\{(?P<partial>[a-z]+):sum\})?"
)


@dataclass(frozen=True)
class Axis:
    """One axis: the names flattened into it, and how it is split over ranks.

    Attributes:
        names: outermost first.
        sharded: group of ranks over which it is split, or None.
        partial: group of ranks that hold summands, or None.
        copies: consecutive ranks that hold the same part of a sharded axis.
    """

    names: tuple[str, ...]
    sharded: str | None = None
    partial: str | None = None
    copies: int = 1


@dataclass(frozen=True)
class Dims:
    """Parsed dims text."""

    axes: tuple[Axis, ...]

    @property
    def position_axis(self) -> int | None:
        """Index of the axis that runs over token positions, or None."""
        for index, axis in enumerate(self.axes):
            if "s" in axis.names:
                return index
        return None


@cache
def parse_dims(text: str) -> Dims:
    """Parse a dims text.

    Raises:
        InputError: the text is not well formed, or names the position axis twice.
    """
    axes: list[Axis] = []
    at = 0
    stripped = text.rstrip()
    while at < len(stripped):
        match = _AXIS.match(stripped, at)
        if match is None:
            raise InputError(f"dims {text!r} cannot be read at {stripped[at:]!r}; write for example 'b s h[tp]'")
        names = tuple(match["group"].split()) if match["group"] else (match["name"],)
        axes.append(Axis(names, match["shard"], match["partial"], int(match["copies"] or 1)))
        at = match.end()
    if sum("s" in axis.names for axis in axes) > 1:
        raise InputError(f"dims {text!r} names the position axis s twice")
    return Dims(tuple(axes))


def by_position(array: npt.NDArray[Any], dims: str) -> npt.NDArray[Any]:
    """View a one-prompt tensor as `[positions, features]`.

    Args:
        array: the stored tensor of one prompt (its batch axis, if any, has length one).
        dims: its dims text.

    Returns:
        A 2-D array: a view where the position axis leads (batch aside), else a copy. A tensor without a
        position axis comes back as one row.
    """
    axis = parse_dims(dims).position_axis if dims else None
    if axis is None or array.ndim == 0:
        return array.reshape(1, array.size)
    positions = array.shape[axis]
    features = math.prod(length for index, length in enumerate(array.shape) if index != axis)
    if any(length != 1 for length in array.shape[:axis]):
        array = np.moveaxis(array, axis, 0)
    return array.reshape(positions, features)
