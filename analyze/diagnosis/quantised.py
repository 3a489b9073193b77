"""Weights that went through a narrow format, recomputed with every usual format and every usual share of a scale.

E4M3 and E5M2: Micikevicius et al. 2022, arXiv:2209.05433. MXFP4: OCP Microscaling Formats 1.0, blocks of 32 with scales
that are powers of two. NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from scipy.stats import norm

from .runs import FloatArray

#: Rounds `[..., n]` whose last axis shares a scale, given the largest magnitude of each.
Rounding = Callable[[FloatArray, FloatArray], FloatArray]
_BLOCKS = (32, 64, 128)
#: Relative distance from bfloat16 numbers up to which an estimate is taken to be such; other weights are 1e-3 away.
_NEAR_BFLOAT16 = 2e-4
#: Dtypes in which weights may be kept after their scale was applied.
NARROW: Mapping[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def _float(dtype: type, top: float) -> Rounding:
    def through(weight: FloatArray, peak: FloatArray) -> FloatArray:
        scale = peak / top
        return np.asarray(np.clip(weight / scale, -top, top).astype(dtype).astype(np.float64) * scale)

    return through


def _integer(top: float, precision: type) -> Rounding:
    """Rounding in some precision: weights of half the largest magnitude are ties, which its last bit decides."""

    def through(weight: FloatArray, peak: FloatArray) -> FloatArray:
        scale = (peak.astype(precision) / precision(top)).astype(precision)
        steps = np.clip(np.rint(weight.astype(precision) / scale), -top, top)
        return np.asarray(steps.astype(np.float64) * scale.astype(np.float64))

    return through


def _power_of_two(weight: FloatArray, peak: FloatArray) -> FloatArray:
    scale = np.exp2(np.floor(np.log2(peak)) - 2)
    return np.asarray(np.clip(weight / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale)


def _normal_levels() -> FloatArray:
    """The 16 levels of NF4: quantiles of the normal distribution, 8 below zero and 9 from zero on, scaled to 1."""
    edge = 0.9677083
    above, below = norm.ppf(np.linspace(edge, 0.5, 9)), -norm.ppf(np.linspace(edge, 0.5, 8))[:-1]
    levels = np.sort(np.concatenate([above, below]))
    return np.asarray(levels / levels.max())


def _normal_float(weight: FloatArray, peak: FloatArray) -> FloatArray:
    levels = _normal_levels()
    at = np.searchsorted((levels[1:] + levels[:-1]) / 2, weight / peak)
    return np.asarray(levels[at] * peak)


#: Names and roundings; Trainium's E4M3 ends at 240.
FORMATS: Sequence[tuple[str, Rounding]] = (
    ("FP8 E4M3", _float(ml_dtypes.float8_e4m3fn, 448.0)),
    ("FP8 E4M3 up to 240", _float(ml_dtypes.float8_e4m3, 240.0)),
    ("FP8 E5M2", _float(ml_dtypes.float8_e5m2, 57344.0)),
    *(("INT8", _integer(127.0, precision)) for precision in (np.float32, np.float64)),
    *(("INT4", _integer(7.0, precision)) for precision in (np.float32, np.float64)),
)
#: Formats that exist in blocks only, and the block.
BLOCK_FORMATS: Mapping[str, tuple[Rounding, int]] = {"MXFP4": (_power_of_two, 32), "NF4": (_normal_float, 64)}


def through_narrow_formats(weight: FloatArray, shared: Mapping[str, float]) -> Iterator[tuple[str, str, FloatArray]]:
    """A weight as every format leaves it: format, what shares a scale, `[out, in]`.

    Args:
        weight: `[out, in]`.
        shared: largest magnitudes over more than this weight, by what they are of.
    """
    blocks = [size for size in _BLOCKS if weight.shape[1] % size == 0 and weight.shape[1] > size]
    for name, rounding in FORMATS:
        yield name, "one scale per tensor", rounding(weight, _peak(weight, None))
        yield name, "one scale per output channel", rounding(weight, _peak(weight, 1))
        for size in blocks:
            yield name, f"one scale per {size} inputs of an output channel", _in_blocks(weight, rounding, size)
        for what, peak in shared.items():
            yield name, f"one scale for {what}", rounding(weight, np.asarray(max(peak, 1e-300)))
    for name, (rounding, size) in BLOCK_FORMATS.items():
        if weight.shape[1] % size == 0:
            yield name, f"one scale per {size} inputs of an output channel", _in_blocks(weight, rounding, size)


def as_released(weight: FloatArray) -> FloatArray:
    """An estimated weight as the bfloat16 numbers that it must have been, when it is as near to such numbers."""
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float64)
    near = np.linalg.norm(rounded - weight) <= _NEAR_BFLOAT16 * np.linalg.norm(weight)
    return np.asarray(rounded) if near else weight


def _in_blocks(weight: FloatArray, rounding: Rounding, size: int) -> FloatArray:
    blocks = weight.reshape(len(weight), -1, size)
    return np.asarray(rounding(blocks, _peak(blocks, 2)).reshape(weight.shape))


def _peak(weight: FloatArray, axis: int | None) -> FloatArray:
    return np.asarray(np.maximum(np.abs(weight).max(axis=axis, keepdims=axis is not None), 1e-300))
