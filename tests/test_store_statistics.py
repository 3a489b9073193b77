"""Statistics of a tensor agree with float64 numpy over its finite elements."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.store.dtypes import NUMPY_DTYPES
from tensorsleuth.store.statistics import statistics_of

Array = npt.NDArray[Any]
REAL = sorted(name for name, dtype in NUMPY_DTYPES.items() if dtype.kind != "c")
FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-40, -1e-40, 1e-45, 1.0, 3.4028235e38)


def check(array: Array) -> None:
    """Hold every statistic against the plain computation."""
    found = statistics_of(array)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = array.astype(np.float64).reshape(-1)
    finite = wide[np.isfinite(wide)]
    assert found.n_nan == np.isnan(wide).sum()
    assert found.n_inf == np.isinf(wide).sum()
    assert found.n_zero == (wide == 0).sum()
    moments = (found.mean, found.std, found.min, found.max, found.absmax)
    if finite.size == 0:
        assert moments == (None,) * 5
        return
    mean, std, low, high, absmax = (float(value) for value in moments)  # type: ignore[arg-type]
    assert (low, high, absmax) == (finite.min(), finite.max(), np.abs(finite).max())
    exact = math.fsum(finite / absmax) / finite.size * absmax if absmax else 0.0
    assert mean == pytest.approx(exact, rel=1e-9, abs=1e-12 * absmax)
    spread = (finite - exact) / (absmax or 1.0)
    expected = math.sqrt(math.fsum(spread * spread) / finite.size) * absmax
    # Squares are summed around the first finite element: its distance from the mean bounds the rounding.
    assert std == pytest.approx(expected, rel=1e-8, abs=1e-9 * abs(finite[0] - exact) + 1e-300)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 20_000])
def test_any_bit_pattern_of_any_real_dtype(name: str, size: int) -> None:
    dtype = NUMPY_DTYPES[name]
    raw = np.random.default_rng(size).integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
    if name == "bool":
        raw &= 1
    values = raw.view(dtype)
    if name == "float64":  # squares of random doubles leave the range of double itself
        values = np.where(np.abs(values) < 1e150, values, np.nan)
    check(values)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FLOATS)),
    values=st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(-1e4, 1e4)), max_size=40),
    repeats=st.sampled_from([1, 1, 1, 300]),
)
def test_mixtures_of_ordinary_values_zeros_denormals_huge_values_and_nonfinite_ones(
    name: str, values: list[float], repeats: int
) -> None:
    with np.errstate(over="ignore"):
        check(np.array(values * repeats, np.float64).astype(FLOATS[name]))


@settings(max_examples=30)
@given(
    name=st.sampled_from(["float32", "bfloat16", "float16"]),
    mean=st.floats(100, 3e4),
    ulps=st.integers(0, 3),
    size=st.integers(2, 20_000),
    seed=st.integers(0, 99),
)
def test_a_large_mean_does_not_swallow_a_small_variance(
    name: str, mean: float, ulps: int, size: int, seed: int
) -> None:
    centre = np.full(size, mean, FLOATS[name])
    steps = np.random.default_rng(seed).integers(0, ulps + 1, size)
    bits = centre.view(f"u{centre.dtype.itemsize}") + steps.astype(f"u{centre.dtype.itemsize}")
    array = bits.view(FLOATS[name])
    check(array)
    assert (statistics_of(array).std == 0.0) == (len(set(steps)) == 1)


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_nonfinite_blocks_before_and_between_finite_ones(name: str) -> None:
    array = np.random.default_rng(0).normal(300, 1, 3 * 4096 + 11).astype(FLOATS[name])
    array[:5000] = np.nan
    array[9000] = np.nan
    if name != "float8_e4m3fn":
        array[9001:9003] = (np.inf, -np.inf)
    check(array)


def test_without_finite_elements_there_are_counts_and_no_moments() -> None:
    empty = statistics_of(np.empty((0, 3), np.float32))
    assert (empty.mean, empty.n_nan, empty.n_zero) == (None, 0, 0)
    check(np.array([np.nan, np.inf, -np.inf, np.inf], np.float32))


def test_complex_tensors_have_counts_only() -> None:
    found = statistics_of(np.array([0, 1 + 2j, np.nan, complex(0, np.inf)], np.complex64))
    assert (found.mean, found.std, found.min, found.max, found.absmax) == (None,) * 5
    assert (found.n_nan, found.n_inf, found.n_zero) == (1, 1, 1)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int32"])
def test_strided_views_and_scalars(name: str) -> None:
    dtype = NUMPY_DTYPES[name]
    grid = np.arange(-60, 60).reshape(2, 3, 20).astype(dtype)
    check(grid.transpose(2, 0, 1)[::3])
    check(np.asarray(grid[1, 2, 3]))
