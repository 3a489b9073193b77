"""The global tensor of a site from what the ranks of a run stored, as the dims say.

- `[tp]`: the ranks' parts are joined along that axis in rank order; `[tp/k]`: those of every k-th rank.
- `{tp:sum}`: the ranks' summands are added in float64, 16-bit and 8-bit floats in float32, where their sum is as
  good as exact; integers in int64. What the sum is compared with was rounded once more, by the model's own reduction.
- `s[tp]` (sequence parallelism): every rank's positions stand for themselves. Ranks that all start at the same
  position are taken to follow one another.
- no annotation: all ranks hold the same, and the lowest is read.

Parts are joined for the positions that are asked for, never for a whole tensor; one part is never copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..store.dims import by_position, parse_dims
from ..store.errors import InputError
from ..store.trace import Trace

Array = npt.NDArray[Any]
#: Ranges `(start, stop)` of features, in the order in which they are read.
Columns = tuple[tuple[int, int], ...]

_GROUP = "tp"


@dataclass(frozen=True)
class Layout:
    """How ranks hold a tensor.

    Attributes:
        axis: the axis that is split over ranks, None when none is.
        by_features: that axis is not the one of positions.
        copies: consecutive ranks that hold the same part.
        partial: the ranks hold summands.
        n_axes: number of axes that the dims name, 0 when unknown.
    """

    axis: int | None
    by_features: bool
    copies: int
    partial: bool
    n_axes: int


@cache
def layout_of(dims: str) -> Layout:
    """Read a dims text for what it says about ranks.

    Raises:
        InputError: it is not well formed, splits two axes, or names a group of ranks other than tp.
    """
    parsed = parse_dims(dims)
    sharded = [index for index, axis in enumerate(parsed.axes) if axis.sharded is not None]
    partial = any(axis.partial is not None for axis in parsed.axes)
    groups = {group for axis in parsed.axes for group in (axis.sharded, axis.partial) if group is not None}
    if groups - {_GROUP}:
        raise InputError(f"dims {dims!r} name ranks {', '.join(sorted(groups))}; only {_GROUP} can be put together")
    if len(sharded) + partial > 1:
        raise InputError(f"dims {dims!r} split a tensor over ranks in two ways; only one can be undone")
    axis = sharded[0] if sharded else None
    copies = parsed.axes[axis].copies if axis is not None else 1
    return Layout(axis, axis is not None and axis != parsed.position_axis, copies, partial, len(parsed.axes))


@dataclass(frozen=True)
class Part:
    """What one rank stored of a tensor: where its values lie."""

    rank: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    path: str

    def values(self, trace: Trace) -> Array:
        """A read-only view of the shard."""
        return trace.values(self.path, self.dtype, self.shape, self.offset, self.nbytes)


@dataclass(frozen=True)
class Stored:
    """One tensor of a site, values unread; several parts when it is put together from several ranks.

    `held` is given where rows are tokens in no order: the row of every position, of a tensor whose leading axes are
    flattened until rows are as many as `held_axes` of them hold. `chosen` are the numbers of every token's experts,
    for a tensor that holds what each of them computed, `(b s) k h`.
    """

    prompt: int
    phase: str
    step: int
    dims: str
    position_start: int | None
    position_count: int | None
    parts: tuple[Part, ...]
    held: Mapping[int, int] | None = None
    held_axes: int = 1
    chosen: Part | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Stored:
        """A tensor of one rank from its row in the catalog, with the path of its shard."""
        part = Part(row["rank"], row["dtype"], tuple(row["shape"]), row["nbytes"], row["file_offset"], row["path"])
        prompt = -1 if row["prompt"] is None else row["prompt"]
        place = row["position_start"], row["position_count"]
        return cls(prompt, row["phase"], row["step"], row["dims"], *place, (part,))

    @property
    def positions(self) -> Sequence[int]:
        """Token positions that it holds, ascending; none without positions."""
        if self.held is not None:
            return sorted(self.held)
        start = self.position_start
        return range(0) if start is None else range(start, start + (self.position_count or 0))

    @property
    def dtype(self) -> str:
        """Dtype of the stored values by name."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the global tensor."""
        first, layout = self.parts[0].shape, layout_of(self.dims)
        if len(self.parts) == 1 or layout.axis is None:
            return first
        length = sum(part.shape[layout.axis] for part in self.parts)
        return (*first[: layout.axis], length, *first[layout.axis + 1 :])

    @property
    def features(self) -> int:
        """Elements per position, or of the whole tensor without positions."""
        if self.held is not None:
            return math.prod(self.shape[self.held_axes :])
        return math.prod(self.shape) // max(self.position_count or 1, 1)

    def rows(self, trace: Trace, positions: Sequence[int], columns: Columns | None = None) -> Array:
        """Some positions as contiguous `[positions, features]`; a view of the shard where no rearranging is needed.

        Args:
            trace: where the shards are.
            positions: token positions, all of which the tensor covers; ignored for a tensor without positions.
            columns: features to take, None for all.
        """
        axis = parse_dims(self.dims).position_axis if self.dims and self.position_start is not None else None
        arrays = [part.values(trace) for part in self.parts]
        if self.held is not None:
            return self._held_rows(arrays, [self.held[position] for position in positions], columns)
        if axis is not None and arrays[0].ndim:
            window = (slice(None),) * axis + (self._window(positions),)
            arrays = [array[window] for array in arrays]
        joined = _join(arrays, layout_of(self.dims))
        rows = joined.reshape(1, joined.size) if axis is None else by_position(joined, self.dims)
        return np.ascontiguousarray(rows if columns is None else take_columns(rows, columns))

    def of_expert(self, trace: Trace, number: int) -> Stored:
        """What one expert computed, of a tensor that holds what every token's experts did."""
        if self.chosen is None:
            return replace(self, held={})
        chosen = self.chosen.values(trace)
        tokens, choices = np.nonzero(chosen == number)
        first, n_choices = self.position_start or 0, chosen.shape[1]
        held = {first + t: t * n_choices + c for t, c in zip(tokens.tolist(), choices.tolist(), strict=True)}
        return replace(self, held=held, held_axes=2)

    def _window(self, positions: Sequence[int]) -> slice | npt.NDArray[np.int64]:
        """Where some positions are along the axis of positions."""
        first = self.position_start or 0
        if isinstance(positions, range) and positions.step == 1:
            return slice(positions.start - first, positions.stop - first)
        return np.asarray(positions, np.int64) - first

    def _held_rows(self, arrays: Sequence[Array], rows: Sequence[int], columns: Columns | None) -> Array:
        flat = [array.reshape(-1, *array.shape[self.held_axes :])[rows] for array in arrays]
        layout = layout_of(self.dims)
        if layout.axis is not None:
            layout = replace(layout, axis=layout.axis - self.held_axes + 1)
        joined = _join(flat, layout).reshape(len(rows), -1)
        return np.ascontiguousarray(joined if columns is None else take_columns(joined, columns))


def take_columns(rows: Array, columns: Columns) -> Array:
    """Some features of `[positions, features]`, in the order of the ranges."""
    if len(columns) == 1:
        return rows[:, columns[0][0] : columns[0][1]]
    return rows[:, np.concatenate([np.arange(start, stop) for start, stop in columns])]


def _join(arrays: Sequence[Array], layout: Layout) -> Array:
    if len(arrays) == 1:
        return arrays[0]
    if layout.axis is not None:
        return np.concatenate(arrays, layout.axis)
    total = arrays[0].astype(_sum_dtype(arrays[0].dtype))
    for array in arrays[1:]:
        total += array.astype(total.dtype)
    return total


def _sum_dtype(dtype: np.dtype[Any]) -> type[np.generic]:
    if dtype.kind == "c":
        return np.complex128
    if dtype.kind in "biu":
        return np.int64
    return np.float32 if dtype.itemsize < 4 else np.float64


def assemble(tensors: Sequence[Stored], tp: int, origin: str) -> list[Stored]:
    """Put the tensors of one site together from those of its ranks.

    Tensors that some rank lacks are left out.

    Args:
        tensors: of one part each, in rank order within a step.
        tp: number of ranks of the run.
        origin: run and site, for messages.

    Raises:
        InputError: the dims of a split tensor do not fit its shape.
    """
    groups: dict[tuple[object, ...], list[Stored]] = {}
    for stored in tensors:
        layout = layout_of(stored.dims)
        ordered = layout.axis is not None and not layout.by_features
        start = None if ordered else stored.position_start
        groups.setdefault((stored.prompt, stored.phase, stored.step, stored.dims, start), []).append(stored)
    return [whole for group in groups.values() for whole in _assemble_one(group, tp, origin)]


def _assemble_one(group: Sequence[Stored], tp: int, origin: str) -> list[Stored]:
    layout = layout_of(group[0].dims)
    if layout.axis is None and not layout.partial:
        lowest = min(stored.parts[0].rank for stored in group)
        return [stored for stored in group if stored.parts[0].rank == lowest]
    if any(len(stored.parts[0].shape) != layout.n_axes for stored in group):
        shape = list(group[0].parts[0].shape)
        raise InputError(f"{origin}: dims {group[0].dims!r} do not name each axis of a tensor of shape {shape}")
    if not (layout.by_features or layout.partial):
        return _by_positions(group)
    by_rank = {stored.parts[0].rank: stored for stored in group}
    wanted = range(0, tp, layout.copies)
    if any(rank not in by_rank for rank in wanted):
        return []
    return [replace(by_rank[0], parts=tuple(by_rank[rank].parts[0] for rank in wanted))]


def _by_positions(group: Sequence[Stored]) -> list[Stored]:
    """Ranks that hold different positions; those with one common start follow one another in rank order."""
    ranks = [stored.parts[0].rank for stored in group]
    starts = {stored.position_start for stored in group}
    if len(group) == 1 or len(starts) > 1 or None in starts or len(set(ranks)) < len(ranks):
        return list(group)
    placed, at = [], group[0].position_start or 0
    for stored in sorted(group, key=lambda item: item.parts[0].rank):
        placed.append(replace(stored, position_start=at))
        at += stored.position_count or 0
    return placed
