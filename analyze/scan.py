"""Passes over triples: read them piece by piece into rows of sums and chunks of errors, on one or more threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from . import rows
from .selection import HELD
from .triples import FloatArray, IntArray, Operands, Triple, operands

Take = Callable[[FloatArray, FloatArray], None]

_SLAB = 4096  # rows whose sums are held before they are folded (750 KB)
_SPLIT = 1 << 19  # elements from which a triple is shared between threads; below, waking them costs too much
_NO_SUMS = np.zeros((0, rows.COLUMNS))
_NO_ERRORS = np.zeros((2, 0))


class ErrorBuffer:
    """Collects `HELD` pairs of errors, hands them to `take`, and starts over."""

    def __init__(self, errors: FloatArray, take: Take | None) -> None:
        self.errors = errors
        self.filled = 0
        self.take = take

    def room(self) -> int:
        if self.take is not None and self.filled == HELD:
            self.flush()
        return HELD - self.filled

    def flush(self) -> None:
        if self.take is not None and self.filled:
            self.take(self.errors[0, : self.filled], self.errors[1, : self.filled])
            self.filled = 0


@dataclass(frozen=True, slots=True)
class Sums:
    """What a pass leaves: one folded row, and per row `float64[rows, TOKEN_COLUMNS]` with its positions."""

    total: FloatArray
    tokens: FloatArray
    positions: IntArray
    has_baseline: bool


class _Workshop:
    """Threads and their working memory."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads - 1, "sleuth-scan") if threads > 1 else None  # the caller works too
        self.errors = [np.empty((2, HELD)) for _ in range(threads)]


#: Workshops that are not in use, by threads and room for errors. Starting threads and touching fresh memory costs as
#: much as reading a million elements, so they are kept. List operations are atomic; a forked child has no threads.
_idle: dict[tuple[int, int], list[_Workshop]] = {}
os.register_at_fork(after_in_child=_idle.clear)


class Scanner:
    """Reads triples with `threads` threads; large triples are split by rows. Use as a context manager."""

    def __init__(self, threads: int) -> None:
        from . import kernels

        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.threads = threads
        self._read = kernels.read_rows
        self._kind = threads, HELD
        try:
            self._workshop = _idle.setdefault(self._kind, []).pop()
        except IndexError:
            self._workshop = _Workshop(threads)

    def __enter__(self) -> Scanner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _idle.setdefault(self._kind, []).append(self._workshop)

    def buffers(self, takes: Sequence[Take | None]) -> list[ErrorBuffer]:
        """One buffer per thread, of memory that the next call hands out again; None drops the errors."""
        return [
            ErrorBuffer(_NO_ERRORS if take is None else errors, take)
            for errors, take in zip(self._workshop.errors, takes, strict=True)
        ]

    def sums(self, triples: Iterable[Triple], buffers: list[ErrorBuffer]) -> Sums:
        """First pass: sums of every row; errors go through the buffers, one per thread.

        Raises:
            ValueError: some triples have a baseline and others do not.
        """
        pending: list[FloatArray] = []
        tokens: list[FloatArray] = []
        positions: list[IntArray] = []
        n_pending = 0
        has_baseline: bool | None = None
        for triple in triples:
            view = operands(triple)
            if has_baseline is None:
                has_baseline = view.has_baseline
            elif has_baseline != view.has_baseline:
                raise ValueError("some triples have a baseline and others have none: compare them separately")
            positions.append(triple.positions)
            for sums in self._each_part(view, buffers, self._row_sums):
                for slab in sums:
                    tokens.append(slab[:, : rows.TOKEN_COLUMNS].copy())
                    pending.append(slab)
                    n_pending += len(slab)
                    if n_pending >= _SLAB:
                        pending, n_pending = [rows.fold(np.concatenate(pending))[None]], 1
        return Sums(
            rows.fold(np.concatenate([_NO_SUMS, *pending])),
            np.concatenate([_NO_SUMS[:, : rows.TOKEN_COLUMNS], *tokens]),
            np.concatenate([np.zeros(0, np.int64), *positions]),
            True if has_baseline is None else has_baseline,
        )

    def errors(self, triples: Iterable[Triple], take: Take) -> None:
        """Later pass: only the errors, in chunks and in any order; `take` is called from several threads."""
        buffers = self.buffers([take] * self.threads)
        for triple in triples:
            self._each_part(operands(triple), buffers, self._errors_only)
        for buffer in buffers:
            buffer.flush()

    def _each_part(
        self,
        view: Operands,
        buffers: list[ErrorBuffer],
        work: Callable[[Operands, int, int, ErrorBuffer], list[FloatArray]],
    ) -> list[list[FloatArray]]:
        pool = self._workshop.pool
        if pool is None or view.rows < 2 or view.rows * view.features < _SPLIT:
            return [work(view, 0, view.rows, buffers[0])]
        bounds = [view.rows * part // self.threads for part in range(self.threads + 1)]
        others = [
            pool.submit(work, view, first, last, buffer)
            for first, last, buffer in zip(bounds[1:], bounds[2:], buffers[1:], strict=False)
        ]
        try:
            own = work(view, bounds[0], bounds[1], buffers[0])
        finally:
            wait(others)
        return [own, *(part.result() for part in others)]

    def _row_sums(self, view: Operands, first: int, last: int, buffer: ErrorBuffer) -> list[FloatArray]:
        slabs = []
        for low in range(first, last, _SLAB):
            high = min(low + _SLAB, last)
            sums = np.zeros((high - low, rows.COLUMNS))
            self._read_range(view, low, high, sums, buffer)
            slabs.append(sums)
        return slabs

    def _errors_only(self, view: Operands, first: int, last: int, buffer: ErrorBuffer) -> list[FloatArray]:
        self._read_range(view, first, last, _NO_SUMS, buffer)
        return []

    def _read_range(self, view: Operands, first: int, last: int, sums: FloatArray, buffer: ErrorBuffer) -> None:
        width = view.features
        at, stop = first * width, last * width
        while at < stop:
            until = stop if buffer.take is None else min(stop, at + buffer.room())
            buffer.filled = self._read(
                view.reference, view.baseline, view.target, view.kinds, view.tables, view.has_baseline,
                width, at, until, sums[at // width - first :], buffer.errors, buffer.filled,
            )  # fmt: skip
            at = until
