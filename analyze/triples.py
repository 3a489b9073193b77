"""What is compared: a reference, a baseline and a target tensor, aligned position by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

FLOAT32, FLOAT64, BFLOAT16, INT32, UINT32, TABLE8, TABLE16, INT64, UINT64 = range(9)
ITEM_BYTES = (4, 8, 2, 4, 4, 1, 2, 8, 8)

_WIDENED = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.float64): FLOAT64,
    np.dtype(np.complex64): FLOAT32,
    np.dtype(np.complex128): FLOAT64,
    np.dtype(ml_dtypes.bfloat16): BFLOAT16,
    np.dtype(np.int32): INT32,
    np.dtype(np.uint32): UINT32,
    np.dtype(np.int64): INT64,
    np.dtype(np.uint64): UINT64,
}
_NO_TABLE = np.zeros(0, np.float32)
_NO_BYTES = np.zeros(0, np.uint8)
_NO_BYTES.setflags(write=False)


@dataclass(frozen=True, slots=True)
class Triple:
    """One aligned piece of a comparison; three arrays of one shape `[positions, features]`, C-contiguous.

    The dtypes may differ: float16/32/64, bfloat16, the 8-bit floats of ml_dtypes, integers, bool and complex
    (whose real and imaginary parts are compared as two elements; then all three must be complex). The arrays
    may be read-only memory maps. `baseline` is None in a two-way comparison. `positions` is `int64[positions]`.

    Raises:
        ValueError: shapes differ, an array is not 2-D or not C-contiguous, or `positions` has another length.
    """

    reference: AnyArray
    baseline: AnyArray | None
    target: AnyArray
    positions: IntArray

    def __post_init__(self) -> None:
        shape = self.reference.shape
        if len(shape) != 2:
            raise ValueError(f"a triple holds 2-D arrays [positions, features]; the reference is {shape}")
        for role, array in (("reference", self.reference), ("baseline", self.baseline), ("target", self.target)):
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{role} has shape {array.shape}, the reference {shape}: align them first")
            if not array.flags.c_contiguous:
                raise ValueError(f"{role} is not C-contiguous: pass numpy.ascontiguousarray({role})")
        if len(self.positions) != shape[0]:
            raise ValueError(f"{len(self.positions)} positions were given for {shape[0]} rows")


Triples = Iterable[Triple] | Callable[[], Iterable[Triple]]
Groups = Mapping[int, Triples]


def reopen(triples: Triples) -> Iterable[Triple]:
    """A fresh pass over a prompt's triples.

    Raises:
        ValueError: `triples` is an iterator, which a second pass would find exhausted.
    """
    if callable(triples):
        return triples()
    if iter(triples) is triples:
        raise ValueError("triples are read more than once: pass a sequence or a callable, not an iterator")
    return triples


class Operands(NamedTuple):
    """A triple as the compiled loops see it: bytes, how to widen them to float64, and lookup tables.

    `kinds` packs the three widening kinds into one integer, four bits each, reference lowest.
    """

    reference: ByteArray
    baseline: ByteArray
    target: ByteArray
    kinds: int
    tables: tuple[Float32Array, Float32Array, Float32Array]
    has_baseline: bool
    rows: int
    features: int


def operands(triple: Triple) -> Operands:
    """View a triple's bytes without copying them.

    Raises:
        TypeError: a dtype that cannot be widened exactly, or complex compared with real.
    """
    rows, features = triple.reference.shape
    dtypes = (
        triple.reference.dtype,
        None if triple.baseline is None else triple.baseline.dtype,
        triple.target.dtype,
    )
    kinds, tables, parts = _plan(*dtypes)
    return Operands(
        _bytes(triple.reference),
        _NO_BYTES if triple.baseline is None else _bytes(triple.baseline),
        _bytes(triple.target),
        kinds,
        tables,
        triple.baseline is not None,
        rows,
        features * parts,
    )


def _bytes(array: AnyArray) -> ByteArray:
    view = np.asarray(array).reshape(-1).view(np.uint8)
    view.setflags(write=False)  # one compiled version serves read-only maps and ordinary arrays
    return view


@cache
def _plan(
    reference: np.dtype[Any], baseline: np.dtype[Any] | None, target: np.dtype[Any]
) -> tuple[int, tuple[Float32Array, Float32Array, Float32Array], int]:
    sides = (reference, reference if baseline is None else baseline, target)
    if len({dtype.kind == "c" for dtype in sides}) == 2:
        raise TypeError(f"cannot compare complex with real tensors: dtypes are {', '.join(map(str, sides))}")
    widened = [_widening(dtype) for dtype in sides]
    kinds = sum(kind << (4 * side) for side, (kind, _) in enumerate(widened))
    return kinds, (widened[0][1], widened[1][1], widened[2][1]), 2 if reference.kind == "c" else 1


@cache
def _widening(dtype: np.dtype[Any]) -> tuple[int, Float32Array]:
    if dtype in _WIDENED:
        return _WIDENED[dtype], _NO_TABLE
    numeric = dtype.kind in "biuf" or hasattr(ml_dtypes, dtype.name)
    if not (numeric and dtype.isnative and dtype.itemsize in (1, 2)):
        raise TypeError(
            f"cannot compare tensors of dtype {dtype}: expected native-endian floats up to 64 bits, integers, "
            "bool or complex; convert it first"
        )
    codes = np.arange(256, dtype=np.uint8) if dtype.itemsize == 1 else np.arange(65536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        table = codes.view(dtype).astype(np.float32)  # exact: no type of 8 or 16 bits exceeds float32
    return (TABLE8 if dtype.itemsize == 1 else TABLE16), table
