"""Element types that the shards hold bit for bit, named as torch names them.

A dtype is known by name (`bfloat16`, `float8_e4m3fn`), because the store never imports torch. Each has a
numpy view (ml_dtypes supplies the ones numpy lacks) and an HDF5 type that other HDF5 tools print correctly:
BF16 and FP8 are described to HDF5 as floating-point types of their own layout, so `h5dump` shows numbers and
not integers. Bits are always moved raw; HDF5 never converts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import UnsupportedDtypeError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FloatLayout:
    """Bit fields of a floating-point format, in the order H5Tset_fields takes them (positions are LSB = 0)."""

    sign: int
    exponent: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    nbytes: int


_BFLOAT16 = FloatLayout(15, 7, 8, 7, 127, 2)
_FLOAT_LAYOUTS = {
    "bfloat16": _BFLOAT16,
    "float8_e4m3fn": FloatLayout(7, 3, 4, 3, 7, 1),
    "float8_e5m2": FloatLayout(7, 2, 5, 2, 15, 1),
    "float8_e4m3fnuz": FloatLayout(7, 3, 4, 3, 8, 1),
    "float8_e5m2fnuz": FloatLayout(7, 2, 5, 2, 16, 1),
}

#: Every accepted dtype name and its numpy dtype. `float8_e8m0fnu` has no sign and no mantissa, which HDF5
#: cannot describe: its bytes are stored as unsigned integers.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def dtype_named(name: str) -> np.dtype[Any]:
    """The numpy dtype of a torch dtype name.

    Raises:
        UnsupportedDtypeError: the shards do not hold this dtype.
    """
    try:
        return NUMPY_DTYPES[name]
    except KeyError:
        accepted = ", ".join(NUMPY_DTYPES)
        raise UnsupportedDtypeError(f"dtype {name} cannot be stored bit for bit; accepted: {accepted}") from None


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The torch name of a numpy dtype.

    Raises:
        UnsupportedDtypeError: no accepted torch dtype has this layout.
    """
    try:
        return _NAMES[dtype.newbyteorder("=")]
    except (KeyError, TypeError):
        raise UnsupportedDtypeError(
            f"numpy dtype {dtype} cannot be stored; convert it to one of {', '.join(NUMPY_DTYPES)}"
        ) from None


@cache
def hdf5_type(name: str) -> Any:
    """The HDF5 file type (h5py low-level TypeID) of a dtype name."""
    from h5py import h5t

    layout = _FLOAT_LAYOUTS.get(name)
    if layout is None:
        dtype = dtype_named(name)
        return h5t.py_create(np.dtype(np.uint8) if name == "float8_e8m0fnu" else dtype, logical=True)
    base = h5t.IEEE_F32LE.copy()
    base.set_fields(layout.sign, layout.exponent, layout.exponent_bits, 0, layout.mantissa_bits)
    base.set_size(layout.nbytes)
    base.set_ebias(layout.bias)
    base.lock()
    return base
