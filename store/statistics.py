"""Per-tensor statistics in one pass over the raw bits, computed while the tensor is written.

float32, bfloat16 and float16 go through compiled loops whose reductions vectorise: order statistics are taken
on an order-preserving integer image of the bits, sums in float64 over blocks, shifted by the first finite
element so that a large mean does not swallow the variance. Other dtypes use numpy.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .index import Statistics
from .statistics_kernels import Sums, scan_bfloat16, scan_float32

_EMPTY = Statistics(None, None, None, None, None, 0, 0, 0)


def statistics_of(array: npt.NDArray[Any]) -> Statistics:
    """Statistics of one tensor of any stored dtype and shape."""
    if array.size == 0:
        return _EMPTY
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == np.float32:
        return _from_sums(scan_float32(flat, flat.view(np.int32)), flat.size)
    if flat.dtype == ml_dtypes.bfloat16:
        return _from_sums(scan_bfloat16(flat.view(np.int16)), flat.size)
    if flat.dtype == np.float16:
        with np.errstate(invalid="ignore"):
            wide = flat.astype(np.float32)
        return _from_sums(scan_float32(wide, wide.view(np.int32)), flat.size)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return _with_numpy(flat)


def _from_sums(sums: Sums, size: int) -> Statistics:
    shift, total, squares, low, high, largest, n_nan, n_inf, n_zero = sums
    finite = size - n_nan - n_inf
    if finite == 0:
        return Statistics(None, None, None, None, None, int(n_nan), int(n_inf), int(n_zero))
    mean = total / finite
    variance = max(squares / finite - mean * mean, 0.0)
    return Statistics(shift + mean, math.sqrt(variance), low, high, largest, int(n_nan), int(n_inf), int(n_zero))


def _with_numpy(flat: npt.NDArray[Any]) -> Statistics:
    zeros = int(np.count_nonzero(flat == 0))
    if flat.dtype.kind == "c":
        nan = int(np.count_nonzero(np.isnan(flat)))
        return Statistics(None, None, None, None, None, nan, int(np.count_nonzero(np.isinf(flat))), zeros)
    values = flat.astype(np.float64)
    n_nan, n_inf = int(np.count_nonzero(np.isnan(values))), int(np.count_nonzero(np.isinf(values)))
    if n_nan or n_inf:
        values = values[np.isfinite(values)]
    if values.size == 0:
        return Statistics(None, None, None, None, None, n_nan, n_inf, zeros)
    low, high = float(values.min()), float(values.max())
    scale = max(abs(low), abs(high)) or 1.0
    scaled = values / scale
    return Statistics(
        float(scaled.mean()) * scale,
        float(scaled.std()) * scale,
        low,
        high,
        max(abs(low), abs(high)),
        n_nan,
        n_inf,
        zeros,
    )
