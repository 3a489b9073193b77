"""What a measurement says, held against plain float64 numpy on the same tensors."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.analyze.measure import Measurement, Triple, measure

FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_)

# Columns that agree to 1e-8 relative. The others enter with the absolute scale that `assert_agrees` names.
RELATIVE = (
    "reference_norm",
    "baseline_error",
    "target_error",
    "r_ratio",
    "relative_l2",
    "relative_l2_baseline",
    "max_abs_error",
    "linf_ratio",
)


def plain(r: Any, b: Any, t: Any) -> dict[str, float]:
    """Every column that sums can tell, the straightforward way; r, b, t are float64 vectors, finite, not empty."""
    eb, et = b - r, t - r
    with np.errstate(divide="ignore", invalid="ignore"):
        baseline, target, norm = (np.linalg.norm(x) for x in (eb, et, r))
        out = {
            "reference_norm": norm,
            "baseline_error": baseline,
            "target_error": target,
            "r_ratio": target / (baseline + 1e-12 * norm) if baseline > 0 else target / baseline,
            "relative_l2": target / norm,
            "relative_l2_baseline": baseline / norm,
            "cosine": (t @ r) / (np.linalg.norm(t) * norm),
            "max_abs_error": np.abs(et).max(),
            "linf_ratio": np.abs(et).max() / np.abs(eb).max(),
            "baseline_std": eb.std(),
            "target_std": et.std(),
            "mean_error": et.mean(),
        }
        centred = r - r.mean()
        slope = (centred @ (et - et.mean())) / (centred @ centred)
        residual = np.linalg.norm((et - et.mean()) - (slope * centred if centred.any() else 0.0))
        out["fit_scale"] = 1 + slope
        out["fit_offset"] = et.mean() - slope * r.mean()
        out["fit_residual"] = residual / (baseline + 1e-12 * norm) if baseline > 0 else residual / baseline
    return {name: float(value) for name, value in out.items()}


def assert_agrees(record: Measurement, r: Any, b: Any, t: Any) -> None:
    """1e-8 relative, with these absolute scales.

    cosine: 1. Standard deviations and mean_error: the largest error (1e-12 of it), since a mean that dwarfs the
    spread costs digits in float64 numpy as well. fit_residual: 1e-7 of R, the rounding of its square.
    fit_scale, fit_offset: the target error that the slope explains.
    """
    expected = plain(r, b, t)
    largest_b, largest_t = np.abs(b - r).max(), np.abs(t - r).max()
    spread = r.std()
    slope_scale = largest_t / spread if spread > 0 else 0.0
    absolute = dict.fromkeys(RELATIVE, 0.0) | {
        "cosine": 1e-12,
        "baseline_std": 1e-12 * largest_b,
        "target_std": 1e-12 * largest_t,
        "mean_error": 1e-12 * largest_t,
        "fit_residual": 1e-7 * expected["r_ratio"],
        "fit_scale": 1e-8 * slope_scale,
        "fit_offset": 1e-8 * (largest_t + slope_scale * np.abs(r).max()),
    }
    constant = spread <= 1e-9 * np.abs(r).max()
    for name, atol in absolute.items():
        if constant and name.startswith("fit"):
            continue
        if not (np.isfinite(expected[name]) and np.isfinite(atol)):
            assert np.array_equal(getattr(record, name), expected[name], equal_nan=True), name
        else:
            np.testing.assert_allclose(getattr(record, name), expected[name], 1e-8, atol, err_msg=name)


def triple(r: Any, b: Any, t: Any, first: int = 0) -> Triple:
    return Triple(r, b, t, np.arange(first, first + len(r)))


def cut(whole: Triple, at: list[int]) -> list[Triple]:
    bounds = [0, *sorted(at), len(whole.positions)]
    return [
        Triple(
            whole.reference[a:z],
            None if whole.baseline is None else whole.baseline[a:z],
            whole.target[a:z],
            whole.positions[a:z],
        )
        for a, z in pairwise(bounds)
    ]


def make(seed: int, rows: int, features: int, scale: float, offset: float, dtypes: Any) -> Triple:
    rng = np.random.default_rng(seed)
    r = rng.standard_normal((rows, features)) * scale + offset * scale
    noise = [r, r * (1 + 1e-3 * rng.standard_normal(r.shape)), r * 1.01 + 1e-3 * scale * rng.standard_normal(r.shape)]
    zeros = rng.random(r.shape) < 0.1
    with np.errstate(over="ignore"):
        return triple(*(np.where(zeros, 0, x).astype(dtype) for x, dtype in zip(noise, dtypes, strict=True)))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 63, 64, 513, 2000]),
    st.integers(-30, 30),
    st.sampled_from([0.0, 1.0, 1e3]),
    st.tuples(*[st.sampled_from(FLOATS[:4])] * 3),
    st.data(),
)
def test_every_column_agrees_with_plain_numpy(
    seed: int, rows: int, features: int, power: int, offset: float, dtypes: Any, data: st.DataObject
) -> None:
    whole = make(seed, rows, features, 10.0**power, offset, dtypes)
    wide = [np.asarray(x).astype(np.float64) for x in (whole.reference, whole.baseline, whole.target)]
    pieces = cut(whole, data.draw(st.lists(st.integers(0, rows), max_size=4)))
    record = measure({7: pieces}, threads=1)[7]
    if not all(np.isfinite(x).all() for x in wide):
        shared = np.isinf(wide[0]) & (wide[0] == wide[1]) & (wide[0] == wide[2])
        keep = ~shared
        if not all(np.isfinite(x[keep]).all() for x in wide):
            assert record.state == "nonfinite"
            return
        wide = [x[keep] for x in wide]
    r, b, t = (x.ravel() for x in wide)
    assert record.n == r.size
    if r.size:
        assert record.state == ("measured" if (b != r).any() else "baseline_exact" if (t != r).any() else "exact")
        assert_agrees(record, r, b, t)


@pytest.mark.parametrize("target", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("reference", [np.float32, ml_dtypes.float8_e4m3fn, np.int32, np.uint64])
def test_all_dtypes_widen_exactly(reference: Any, target: Any) -> None:
    rng = np.random.default_rng(3)
    r, b, t = (rng.integers(0, 9, (6, 700)).astype(dtype) for dtype in (reference, target, target))
    record = measure({0: [triple(r, b, t)]})[0]
    assert_agrees(record, *(x.astype(np.float64).ravel() for x in (r, b, t)))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_beyond_2_to_53_are_subtracted_as_integers(dtype: Any) -> None:
    r = np.array([[2**60, 2**62 + 1, 2**63 - 1, 5]], dtype)
    b = r - np.array([[1, 2, 3, 4]], dtype)
    t = r - np.array([[3, 3, 0, 2**53 - 1 if dtype == np.int64 else 5]], dtype)
    record = measure({0: [triple(r, b, t)]})[0]
    exact = [int(x) - int(y) for x, y in zip(t[0], r[0], strict=True)]
    assert record.baseline_error == pytest.approx(30**0.5, rel=1e-15)
    assert record.max_abs_error == max(map(abs, exact))
    assert record.mean_error == pytest.approx(sum(exact) / 4, rel=1e-15)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_elements_count_as_two(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    r, b, t = ((rng.standard_normal((3, 9)) + 1j * rng.standard_normal((3, 9))).astype(dtype) for _ in range(3))
    record = measure({0: [triple(r, b, t)]})[0]
    assert record.n == 54
    assert record.target_error == pytest.approx(float(np.linalg.norm(t.astype(complex) - r.astype(complex))), rel=1e-12)
    with pytest.raises(TypeError, match="complex with real"):
        measure({0: [triple(r, b, t.real.copy())]})


def test_sums_are_not_taken_in_float32() -> None:
    """4M nearly constant values: a float32 accumulator stalls, and a float32 difference is off by 6e-8."""
    rng = np.random.default_rng(1)
    r = (1000 + rng.random((1024, 4096), np.float32)).astype(np.float32)
    t, b = r + np.float32(0.25) * rng.random(r.shape, np.float32), r + np.float32(0.125)
    record = measure({0: [triple(r, b, t)]}, quantiles=False)[0]
    assert_agrees(record, *(x.astype(np.float64).ravel() for x in (r, b, t)))
    odd = np.array([[1 + 2**-23, 3.0]], np.float32)
    wide = np.array([[1 + 2**-40, 3.0]])
    assert measure({0: [triple(odd, odd, wide)]})[0].max_abs_error == 2**-23 - 2**-40


def test_a_spread_far_below_the_mean_keeps_its_digits() -> None:
    rng = np.random.default_rng(0)
    r = 1e4 + rng.standard_normal((3, 4096))
    b, t = r + 1.0 + 1e-5 * rng.standard_normal(r.shape), 1.001 * r + 1e-5 * rng.standard_normal(r.shape)
    record = measure({0: [triple(r, b, t)]})[0]
    eb, et = b - r, t - r
    assert record.baseline_std == pytest.approx(eb.std(), rel=1e-9)
    assert record.sigma_ratio == pytest.approx(et.std() / eb.std(), rel=1e-9)
    scale, offset = np.polynomial.Polynomial.fit(r.ravel(), et.ravel(), 1).convert().coef[::-1]
    assert record.fit_scale - 1 == pytest.approx(scale, rel=1e-6)
    assert record.fit_offset == pytest.approx(offset, abs=1e-6 * np.abs(et).max())


def test_threads_and_chunks_change_nothing_but_rounding() -> None:
    whole = make(2, 700, 2048, 1.0, 0.0, (np.float32, ml_dtypes.bfloat16, ml_dtypes.bfloat16))
    one = measure({0: [whole]}, threads=1)[0]
    for other in (measure({0: [whole]}, threads=3)[0], measure({0: lambda: iter(cut(whole, [1, 2, 500]))})[0]):
        assert other.quantiles is not None
        assert one.quantiles is not None
        np.testing.assert_array_equal(one.quantiles.target, other.quantiles.target)
        np.testing.assert_allclose(one.r_ratio, other.r_ratio, 1e-12)
        np.testing.assert_allclose(one.fit_residual, other.fit_residual, 1e-9)


def test_token_errors_are_per_position_sums() -> None:
    whole = make(4, 50, 300, 1.0, 0.0, (np.float32,) * 3)
    tokens = measure({0: cut(whole, [10, 11, 12])})[0].tokens
    assert tokens is not None
    r, b, t = (np.asarray(x).astype(np.float64) for x in (whole.reference, whole.baseline, whole.target))
    np.testing.assert_array_equal(tokens.positions, np.arange(50))
    np.testing.assert_allclose(tokens.reference_sq, (r**2).sum(1), 1e-12)
    np.testing.assert_allclose(tokens.baseline_sq, ((b - r) ** 2).sum(1), 1e-12)
    np.testing.assert_allclose(tokens.target_sq, ((t - r) ** 2).sum(1), 1e-12)


def test_pooled_record_measures_the_concatenation() -> None:
    prompts = {p: make(p, 20 + p, 128, 10.0**p, 0.0, (np.float32,) * 3) for p in range(6)}
    records = measure({p: [t] for p, t in prompts.items()})
    together = [
        np.concatenate([np.asarray(getattr(t, side)).astype(np.float64).ravel() for t in prompts.values()])
        for side in ("reference", "baseline", "target")
    ]
    assert_agrees(records[None], *together)
    assert records[None].tokens is None
    assert set(records) == {*prompts, None}
    assert records[None].r_low < records[None].r_ratio < records[None].r_high


def test_shared_nonfinite_values_are_left_out_and_others_are_a_finding() -> None:
    inf, nan = np.inf, np.nan
    r = np.array([[1, -inf, nan, 2]], np.float32)
    b = np.array([[1.5, -inf, nan, 2]], np.float32)
    masked = measure({0: [triple(r, b, b)]})[0]
    assert (masked.state, masked.n, masked.n_excluded, masked.target_error) == ("measured", 2, 2, 0.5)
    bad = measure({0: [triple(r, b, np.array([[inf, inf, nan, nan]], np.float32))]})[0]
    assert (bad.state, bad.n, bad.n_excluded) == ("nonfinite", 0, 1)
    assert (bad.n_nonfinite_reference, bad.n_nonfinite_baseline, bad.n_nonfinite_target) == (1, 1, 3)
    for name in (*RELATIVE, "cosine", "mean_error", "fit_scale", "r_low", "qq_w1", "ks"):
        assert np.isnan(getattr(bad, name)), name
    assert bad.tokens is not None
    assert np.isnan(bad.tokens.target_sq).all()


def test_a_nonfinite_element_is_found_anywhere() -> None:
    for place in (0, 1023, 1024, 4095, 5000):
        r = np.zeros((2, 4096), np.float32)
        t = r.copy()
        t.flat[place] = np.nan
        record = measure({0: [triple(r, r, t)]})[0]
        assert (record.state, record.n, record.n_nonfinite_target) == ("nonfinite", 8191, 1)


def test_a_difference_beyond_float64_is_nonfinite() -> None:
    r, t = np.array([[-1e308, 1.0]]), np.array([[1e308, 1.0]])
    assert measure({0: [triple(r, r, t)]})[0].state == "nonfinite"


def test_zero_denominators_say_what_they_are() -> None:
    zero, one, two = (np.full((3, 4), x, np.float32) for x in (0, 1, 2))
    exact = measure({0: [triple(one, one, one)]})[0]
    assert exact.state == "exact"
    assert (exact.target_error, exact.relative_l2, exact.cosine) == (0.0, 0.0, 1.0)
    for name in ("r_ratio", "r_low", "linf_ratio", "sigma_ratio", "fit_scale", "fit_residual", "qq_slope", "qq_w1"):
        assert np.isnan(getattr(exact, name)), name
    assert exact.ks == 0.0

    free = measure({0: [triple(one, one, two)]})[0]
    assert (free.state, free.r_ratio, free.linf_ratio) == ("baseline_exact", np.inf, np.inf)
    assert np.isnan([free.r_low, free.sigma_ratio, free.fit_residual]).all()
    assert (free.qq_w1, free.ks) == (np.inf, 1.0)

    nothing = measure({0: [triple(zero, one, two)]})[0]
    assert (nothing.state, nothing.r_ratio, nothing.relative_l2) == ("measured", 2.0, np.inf)
    assert np.isnan(nothing.cosine)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_tensors_measure_nothing(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.float32)
    for groups in ({0: [triple(empty, empty, empty)]}, {0: []}):
        record = measure(groups)[None]
        assert (record.n, record.state) == (0, "exact")
        assert np.isnan([record.reference_norm, record.r_ratio, record.r_low, record.mean_error]).all()


def test_one_element_has_no_interval() -> None:
    record = measure({0: [triple(*(np.array([[x]]) for x in (1.0, 1.5, 3.0)))]})[0]
    assert (record.r_ratio, record.r_low) == (pytest.approx(4.0), pytest.approx(np.nan, nan_ok=True))


def test_without_a_baseline_only_the_target_is_judged() -> None:
    r, t = np.array([[1.0, 2.0]]), np.array([[1.5, 2.0]])
    record = measure({0: [triple(r, None, t)]})[0]
    assert (record.state, record.target_error, record.relative_l2) == ("measured", 0.5, pytest.approx(0.05**0.5))
    for name in ("baseline_error", "r_ratio", "linf_ratio", "sigma_ratio", "qq_slope", "qq_w1", "ks", "fit_residual"):
        assert np.isnan(getattr(record, name)), name
    with pytest.raises(ValueError, match="compare them separately"):
        measure({0: [triple(r, None, t), triple(r, r, t)]})


def test_the_affine_fit_finds_a_known_scale_and_offset() -> None:
    r = np.random.default_rng(0).standard_normal((64, 512))
    b = r + 1e-3 * np.random.default_rng(1).standard_normal(r.shape)
    record = measure({0: [triple(r, b, 2 * r + 3)]})[0]
    assert record.fit_scale == pytest.approx(2, rel=1e-12)
    assert record.fit_offset == pytest.approx(3, rel=1e-12)
    assert record.r_ratio > 1000
    assert record.fit_residual < 1e-7 * record.r_ratio


def test_read_only_memory_maps_are_accepted(tmp_path: Any) -> None:
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    values.tofile(tmp_path / "raw")
    mapped = np.memmap(tmp_path / "raw", np.float32, "r", shape=(8, 64))
    assert measure({0: [triple(mapped, mapped, values + 1)]})[0].state == "baseline_exact"


def test_bad_input_is_refused_with_a_reason() -> None:
    a = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="align them first"):
        triple(a, a, a[:1])
    with pytest.raises(ValueError, match="C-contiguous"):
        triple(a, a, np.zeros((3, 2), np.float32).T)
    with pytest.raises(ValueError, match="not an iterator"):
        measure({0: iter([triple(a, a, a)])})
    with pytest.raises(TypeError, match="dtype"):
        measure({0: [triple(a, a, a.astype(">f4"))]})
    with pytest.raises(ValueError, match="no prompt"):
        measure({})


def test_importing_the_facade_does_not_import_numba() -> None:
    code = "import sys, tensorsleuth.analyze.measure; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
