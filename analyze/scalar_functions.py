"""SQL functions of stored tensors: `r_ratio(ref, base, target)`, `relative_l2(a, b)`, `tensor_quantile(id, q)`, ...

They take tensor ids and stream the values from the shards, so that a question nobody planned is still one query.
All comparisons go through the pass that `measure` makes, and so agree with the measurements to rounding: float64
accumulation, any stored dtype. Tensors are compared on the token positions that all of them cover.

A result is NULL where it is undefined: an id is NULL, values were not stored, no position is shared, the numbers of
features differ, or numerator and denominator are both zero. It is NaN where values are not finite.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ..store import InputError, SleuthError, Trace, TraceNotFoundError
from ..store.dims import by_position, parse_dims
from ..store.index import NO_DATASET
from .moments import NONFINITE, Moments, moments_of
from .order_statistics import quantile
from .scan import Scanner
from .triples import AnyArray, Triple

#: Elements of a tensor that are rearranged at a time, where its layout demands a copy.
_PIECE = 1 << 20
#: Mapped bytes after which pages are given back.
_RELEASE = 256 << 20
#: Results kept, so that several functions of the same tensors read them once: one DuckDB vector and more.
_KEPT = 4096

_LOOKUP = """
SELECT tensor_id, s.path, dtype, shape, file_offset, nbytes, dataset, dims, position_start, position_count
FROM tensors JOIN shards AS s USING (run, shard)
WHERE tensor_id IN (SELECT unnest(?::BIGINT[]))"""


@dataclass(frozen=True)
class ScalarFunction:
    """A function over tensor ids.

    Attributes:
        name: as used in a query.
        tensors: names of the leading parameters, which are tensor ids (BIGINT).
        argument: name and DuckDB type of one more parameter, if any.
        meaning: what it returns (DOUBLE), with its unit.
    """

    name: str
    tensors: tuple[str, ...]
    argument: tuple[str, str] | None
    meaning: str

    @property
    def signature(self) -> str:
        """As one writes it: `tensor_quantile(tensor, q)`."""
        names = (*self.tensors, *([self.argument[0]] if self.argument else []))
        return f"{self.name}({', '.join(names)})"


FUNCTIONS = (
    ScalarFunction(
        "r_ratio",
        ("reference", "baseline", "target"),
        None,
        "R = ||t - r|| / (||b - r|| + 1e-12 ||r||), ratio; infinite where only the baseline is exact",
    ),
    ScalarFunction(
        "relative_l2", ("reference", "other"), None, "||other - reference|| / ||reference||, ratio; the first rules"
    ),
    ScalarFunction("cosine", ("a", "b"), None, "<a, b> / (||a|| ||b||), -1 to 1"),
    ScalarFunction("max_abs_error", ("a", "b"), None, "largest |b - a|, in the tensors' own unit"),
    ScalarFunction(
        "tensor_quantile",
        ("tensor",),
        ("q", "DOUBLE"),
        "quantile for a probability q from 0 to 1, interpolated linearly, in the tensor's own unit; NaN if an element "
        "is NaN; NULL for complex and empty tensors",
    ),
    ScalarFunction(
        "element",
        ("tensor",),
        ("flat_index", "BIGINT"),
        "one element by its row-major index from 0, in the tensor's own unit; NULL outside and for complex tensors",
    ),
)


@dataclass(frozen=True)
class _Tensor:
    """Values of a tensor, and the token positions `start .. start + count` along `axis` (None: no such axis)."""

    tensor_id: int
    values: AnyArray
    dims: str
    axis: int | None
    start: int
    count: int

    @property
    def features(self) -> int:
        return self.values.size if self.axis is None else self.values.size // max(self.values.shape[self.axis], 1)

    @property
    def layout(self) -> tuple[object, ...]:
        """Tensors of one layout hold the same element at the same index."""
        return self.values.shape, self.dims, self.start, self.count

    def rows(self, first: int, stop: int) -> AnyArray:
        """Positions `first .. stop` as contiguous `[positions, features]`; a view where the layout permits."""
        if self.axis is None:
            return self.values.reshape(1, -1)
        part = self.values[(slice(None),) * self.axis + (slice(first - self.start, stop - self.start),)]
        return np.ascontiguousarray(by_position(part, self.dims))


class TensorFunctions:
    """The functions as bound to one connection. DuckDB may call them from several threads; they take turns.

    Attributes:
        failure: the exception that a function raised, which DuckDB passes on as text only.
    """

    def __init__(self, connection: Any, trace: Trace) -> None:
        """Register the functions; use `tensor_functions`, which also lets go of the catalog.

        Args:
            connection: DuckDB connection to the trace's catalog.
            trace: where the values are.
        """
        self.failure: SleuthError | None = None
        self._trace = trace
        # A second connection of its own: DuckDB is in the middle of a query on the first.
        self._lookup = connection.cursor()
        self._scanner = Scanner(1)
        self._lock = threading.Lock()
        self._moments: OrderedDict[tuple[int, ...], Moments | None] = OrderedDict()
        self._touched = 0
        compute: dict[str, Callable[..., float | None]] = {
            "r_ratio": lambda r, b, t: _number(self._compare(r, b, t), "r_ratio"),
            "tensor_quantile": _quantile,
            "element": _element,
        }
        for metric in ("relative_l2", "cosine", "max_abs_error"):
            compute[metric] = partial(self._pair, metric)
        for function in FUNCTIONS:
            kinds = ["BIGINT"] * len(function.tensors) + ([function.argument[1]] if function.argument else [])
            connection.create_function(
                function.name,
                self._vectorised(len(function.tensors), len(kinds), compute[function.name]),
                kinds,
                "DOUBLE",
                type="arrow",
                null_handling="special",
            )

    def close(self) -> None:
        """Let go of the catalog."""
        self._lookup.close()

    def _vectorised(self, n_tensors: int, arity: int, compute: Callable[..., float | None]) -> Callable[..., pa.Array]:
        """A function of Arrow columns from a function of tensors and a last argument."""

        def call(*columns: pa.Array) -> pa.Array:
            rows = list(zip(*(column.to_pylist() for column in columns), strict=True))
            with self._lock:
                try:
                    places = self._places({i for row in rows if None not in row for i in row[:n_tensors]})
                    return pa.array([self._value(row, n_tensors, places, compute) for row in rows], pa.float64())
                except SleuthError as error:
                    self.failure = error
                    raise

        # DuckDB counts the parameters of the signature.
        names = [inspect.Parameter(f"a{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(arity)]
        call.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        return call

    def _value(
        self, row: tuple[Any, ...], n: int, places: dict[int, dict[str, Any]], compute: Callable[..., float | None]
    ) -> float | None:
        if None in row:
            return None
        tensors = [self._open(places[i]) for i in row[:n]]
        if None in tensors:
            return None
        value = compute(*tensors, *row[n:])
        self._touched += sum(places[i]["nbytes"] for i in row[:n])
        if self._touched > _RELEASE:
            self._trace.release_pages()
            self._touched = 0
        return value

    def _places(self, ids: set[int]) -> dict[int, dict[str, Any]]:
        """Where tensors are stored, by id: one query for all."""
        cursor = self._lookup.execute(_LOOKUP, [sorted(ids)])
        names = [column[0] for column in cursor.description]
        found = {row[0]: dict(zip(names, row, strict=True)) for row in cursor.fetchall()}
        if missing := ids - found.keys():
            raise TraceNotFoundError(f"{self._trace.path} has no tensor {min(missing)}; the table tensors lists them")
        return found

    def _open(self, place: dict[str, Any]) -> _Tensor | None:
        """The tensor as a view of its shard; None when only its statistics were stored."""
        if place["dataset"] == NO_DATASET:
            return None
        shape = tuple(place["shape"])
        values = self._trace.values(place["path"], place["dtype"], shape, place["file_offset"], place["nbytes"])
        axis = parse_dims(place["dims"]).position_axis
        if axis is None or axis >= len(shape):
            return _Tensor(place["tensor_id"], values, place["dims"], None, 0, 1)
        count = shape[axis] if place["position_count"] is None else min(place["position_count"], shape[axis])
        return _Tensor(place["tensor_id"], values, place["dims"], axis, place["position_start"] or 0, count)

    def _pair(self, metric: str, reference: _Tensor, other: _Tensor) -> float | None:
        return _number(self._compare(reference, None, other), metric)

    def _compare(self, reference: _Tensor, baseline: _Tensor | None, target: _Tensor) -> Moments | None:
        """Metrics of two or three tensors on the positions that they share; None where they do not fit."""
        key = (reference.tensor_id, -1 if baseline is None else baseline.tensor_id, target.tensor_id)
        if key not in self._moments:
            try:
                sums = self._scanner.sums(_triples(reference, baseline, target), self._scanner.buffers([None]))
                self._moments[key] = moments_of(sums.total, baseline is not None)
            except (_MisfitError, TypeError):  # the scanner does not compare complex with real numbers
                self._moments[key] = None
            if len(self._moments) > _KEPT:
                self._moments.popitem(last=False)
        return self._moments[key]


@contextmanager
def tensor_functions(connection: Any, trace: Trace) -> Iterator[TensorFunctions]:
    """Register the functions on a connection to the trace's catalog, for as long as the context is open.

    While it is open, a query may raise:
        TraceNotFoundError: an id that the catalog does not hold.
        InputError: a probability outside 0 to 1.
        IntegrityError: a shard is missing or truncated.
    """
    functions = TensorFunctions(connection, trace)
    try:
        yield functions
    finally:
        functions.close()


class _MisfitError(Exception):
    """Tensors that share no position, or differ in their number of features."""


def _triples(reference: _Tensor, baseline: _Tensor | None, target: _Tensor) -> Iterator[Triple]:
    """Pieces to compare: a single one without copies where the layouts agree and no position is padding."""
    tensors = [tensor for tensor in (reference, baseline, target) if tensor is not None]
    whole = reference.axis is None or reference.values.shape[reference.axis] == reference.count
    if whole and len({tensor.layout for tensor in tensors}) == 1:
        yield _triple([tensor.values.reshape(1, -1) for tensor in tensors])
        return
    first = max(tensor.start for tensor in tensors)
    stop = min(tensor.start + tensor.count for tensor in tensors)
    if stop <= first or len({tensor.features for tensor in tensors}) > 1:
        raise _MisfitError
    step = max(1, _PIECE // max(reference.features, 1))
    for at in range(first, stop, step):
        yield _triple([tensor.rows(at, min(at + step, stop)) for tensor in tensors])


def _triple(arrays: list[AnyArray]) -> Triple:
    baseline = arrays[1] if len(arrays) == 3 else None
    return Triple(arrays[0], baseline, arrays[-1], np.zeros(len(arrays[0]), np.int64))


def _number(moments: Moments | None, metric: str) -> float | None:
    """A metric; NaN only where values are not finite, None where it is undefined."""
    if moments is None:
        return None
    value = float(getattr(moments, metric))
    return None if np.isnan(value) and moments.state != NONFINITE else value


def _element(tensor: _Tensor, index: int) -> float | None:
    if tensor.values.dtype.kind == "c" or not 0 <= index < tensor.values.size:
        return None
    return float(tensor.values.reshape(-1)[index])


def _quantile(tensor: _Tensor, q: float) -> float | None:
    if not 0 <= q <= 1:
        raise InputError(f"tensor_quantile takes a probability from 0 to 1, not {q}")
    values = tensor.values.reshape(-1)
    return None if values.dtype.kind == "c" or values.size == 0 else quantile(values, q)
