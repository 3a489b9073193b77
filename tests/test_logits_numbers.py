"""Next-token distributions: numbers that plain arithmetic agrees with, invariances, and flips that chance explains."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import binom
from tensorsleuth.analyze.logits.chance import count_limit, distance_spread, flip_odds
from tensorsleuth.analyze.logits.criteria import Positions, evaluate
from tensorsleuth.analyze.logits.distributions import Columns, Grid, measure_rows
from tensorsleuth.analyze.logits.source import ComparedRuns
from tensorsleuth.analyze.logits.table import judged_rows
from tensorsleuth.analyze.triples import Triple
from tensorsleuth.analyze.verdict import Thresholds

Array = npt.NDArray[np.floating]
BFLOAT16 = Grid.of("bfloat16")


def rows(reference: Array, baseline: Array | None, target: Array) -> Columns:
    return measure_rows(Triple(reference, baseline, target, np.arange(len(reference))), BFLOAT16)


def draw(seed: int, n: int = 40, width: int = 300) -> tuple[Array, Array, Array]:
    generator = np.random.default_rng(seed)
    r = (3 * generator.standard_normal((n, width)) - 8).astype(np.float32)
    b, t = ((r + 0.02 * generator.standard_normal(r.shape)).astype(ml_dtypes.bfloat16) for _ in range(2))
    return r, b, t


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def plainly(reference: Array, other: Array) -> dict[str, Array]:
    """Textbook formulas in extended precision."""
    r, x = reference.astype(np.longdouble), other.astype(np.longdouble)
    rc, xc = r - r.mean(axis=1, keepdims=True), x - x.mean(axis=1, keepdims=True)
    log_p, log_q = log_softmax(r), log_softmax(x)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.log((p + q) / 2)
    first = reference.argmax(axis=1)
    top = np.argsort(-reference, axis=1, kind="stable")[:, :5]
    every = np.arange(len(r))
    return {
        "cosine": (rc * xc).sum(1) / np.sqrt((rc**2).sum(1)) / np.sqrt((xc**2).sum(1)),
        "cosine_raw": (r * x).sum(1) / np.sqrt((r**2).sum(1)) / np.sqrt((x**2).sum(1)),
        "kl": (p * (log_p - log_q)).sum(1),
        "js": (p * (log_p - log_m)).sum(1) / 2 + (q * (log_q - log_m)).sum(1) / 2,
        "p_reference_token": q[every, first],
        "rank_reference_token": 1.0 + (x > x[every, first][:, None]).sum(1),
        "target_error": np.sqrt(((xc - rc) ** 2).sum(1)),
        "error_top5": np.abs(np.take_along_axis(xc - rc, top, 1)).max(1)
        / np.abs(np.take_along_axis(rc, top, 1)).max(1),
    }


@settings(max_examples=25)
@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=6, max_side=40),
           elements=st.floats(-30, 30, width=32)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 0.1, 3.0]),
)  # fmt: skip
def test_numbers_agree_with_textbook_formulas(reference: Array, seed: int, scale: float) -> None:
    noise = np.random.default_rng(seed).standard_normal((3, *reference.shape))
    reference = (reference + noise[0]).astype(np.float32)  # so that no row is constant
    baseline, target = ((reference + scale * e).astype(np.float32) for e in noise[1:])
    found, expected = rows(reference, baseline, target), plainly(reference, target)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], np.float64(values), rtol=1e-8, atol=1e-15, err_msg=name)
    norm = np.linalg.norm(reference - reference.mean(axis=1, keepdims=True), axis=1)
    ratio = expected["target_error"] / (plainly(reference, baseline)["target_error"] + 1e-12 * norm)
    np.testing.assert_allclose(found["r_ratio"], np.float64(ratio), rtol=1e-8)
    np.testing.assert_array_equal(found["reference_token"], reference.argmax(axis=1))
    np.testing.assert_array_equal(found["target_token"], target.argmax(axis=1))


def test_softmax_does_not_see_a_shift_and_neither_do_the_centred_numbers() -> None:
    r, b, t = (side.astype(np.float64) for side in draw(1))
    shifts = np.linspace(-50, 50, len(r))[:, None]
    plain, shifted = rows(r, b, t), rows(r, b, t + shifts)
    for name in ("cosine", "r_ratio", "kl", "js", "top5", "error_all", "p_reference_token", "target_token"):
        np.testing.assert_allclose(shifted[name], plain[name], rtol=1e-9, atol=1e-13, err_msg=name)
    assert np.abs(shifted["cosine_raw"] - plain["cosine_raw"]).max() > 0.01
    assert (shifted["r_raw"] / plain["r_raw"]).max() > 10


def test_permuted_logits_have_a_high_raw_cosine_and_no_centred_one() -> None:
    r, b, _ = draw(2, width=2000)
    permuted = np.random.default_rng(3).permuted(r, axis=1)
    found = rows(r, b, permuted)
    assert found["cosine_raw"].mean() > 0.8
    assert np.abs(found["cosine"]).max() < 0.15
    assert found["kl"].min() > 1.0


def test_equal_logits_are_perfect_to_the_last_bit() -> None:
    r, b, _ = draw(4)
    found = rows(r, b, r)
    assert (found["cosine"] == 1.0).all()
    for name in ("kl", "js", "error_all", "target_error", "r_ratio"):
        assert (found[name] == 0.0).all(), name
    for name in ("top1", "top5", "top10", "rank_reference_token"):
        assert (found[name] == 1.0).all(), name


def test_states_and_undefined_ratios() -> None:
    r, b, t = draw(5, n=3)
    baseline, target = r.copy(), r.copy()
    baseline[1], target[1], target[2] = b[1], t[1], t[2]
    found = rows(r, baseline, target)
    assert found["state"].tolist() == ["exact", "measured", "baseline_exact"]
    assert np.isnan(found["r_ratio"][0])
    assert found["r_ratio"][2] == np.inf
    assert np.isnan(rows(r, None, t)["r_ratio"]).all()


def test_ties_count_for_overlaps_and_are_counted() -> None:
    r = np.array([[5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6]], np.float32)
    tied = np.zeros_like(r)
    found = rows(r, r, tied)
    assert (found["top5"], found["top10"], found["n_tied"]) == (1.0, 1.0, 12.0)
    swapped = rows(r, r, r[:, ::-1].copy())
    assert (swapped["top5"], swapped["top10"], swapped["rank_reference_token"]) == (0.0, 0.8, 12.0)


def test_values_that_are_not_finite_are_reported_never_replaced() -> None:
    r, b, t = draw(6, n=4)
    t[1, 7], t[2, 0], b[3, 5] = np.nan, np.inf, np.nan
    found = rows(r, b, t)
    assert found["state"].tolist() == ["measured", "nonfinite", "nonfinite", "nonfinite"]
    assert found["n_nonfinite_target"].tolist() == [0, 1, 1, 0]
    assert found["n_nonfinite_baseline"].tolist() == [0, 0, 0, 1]
    for name in ("kl", "cosine", "r_ratio", "top1"):
        assert np.isnan(found[name][1:]).all(), name
    clean = rows(*draw(6, n=4))
    assert found["kl"][0] == clean["kl"][0]


def test_tokens_masked_in_every_run_are_left_out_and_keep_their_ids() -> None:
    r, b, t = draw(7, n=5)
    bare = rows(r[:, 10:].copy(), b[:, 10:].copy(), t[:, 10:].copy())
    for side in (r, b, t):
        side[:, :10] = -np.inf
    found = rows(r, b, t)
    np.testing.assert_allclose(found["kl"], bare["kl"], rtol=1e-12)
    np.testing.assert_array_equal(found["reference_token"], bare["reference_token"] + 10)
    t[0, 3] = 0.0  # masked in the reference only
    assert rows(r, b, t)["state"].tolist() == ["nonfinite", *["measured"] * 4]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@given(st.floats(-1e4, 1e4).filter(lambda x: abs(x) > 1e-3))
def test_margins_count_units_in_the_last_place(dtype: type, value: float) -> None:
    rounded = np.array([value]).astype(dtype)
    here = np.float64(np.abs(rounded))
    grid = Grid.of(np.dtype(dtype).name)
    assert np.float64(np.nextafter(np.abs(rounded), np.array([np.inf], dtype))) - here == grid.spacing(here)


def test_the_margin_is_the_lead_over_the_runner_up() -> None:
    r = np.array([[1.0, 12.0, 12.5, 0.0]], np.float32)
    assert rows(r, r, r)["margin_ulp"] == 0.5 / 0.0625  # between 8 and 16 bfloat16 counts in sixteenths


# Chance


@pytest.mark.parametrize(("noise", "rounded"), [(0.02, True), (0.3, True), (0.05, False)])
def test_expected_flips_are_calibrated(noise: float, rounded: bool) -> None:
    """Ports as good as the baseline flip as often as expected, at positions of different scale and margin."""
    generator = np.random.default_rng(11)
    n, width = 6000, 200
    scale = np.exp(generator.normal(0.0, 0.7, (n, 1)))
    r = 3 * generator.standard_normal((n, width))
    b, t = (r + noise * scale * generator.standard_normal(r.shape) for _ in range(2))
    if rounded:
        b, t = (side.astype(ml_dtypes.bfloat16).astype(np.float64) for side in (b, t))
    found = rows(r, b, t)
    spread = distance_spread(found["baseline_error"] / np.sqrt(width), found["moved_sq"], found["moved_n"])
    odds = flip_odds(found["margins"], spread)
    deviation = np.sqrt((odds * (1 - odds)).sum())
    flips = (found["top1"] == 0).sum()
    assert flips > 50
    assert abs(flips - odds.sum()) < 4 * deviation + 0.1 * odds.sum()
    likely = odds > 0.25  # also where a flip is likely, not only on the whole
    assert (found["top1"][likely] == 0).mean() == pytest.approx(odds[likely].mean(), rel=0.15)


def test_three_times_the_error_flips_beyond_what_chance_explains() -> None:
    generator = np.random.default_rng(12)
    r = 3 * generator.standard_normal((1000, 200))
    b, t = r + 0.05 * generator.standard_normal(r.shape), r + 0.3 * generator.standard_normal(r.shape)
    found = rows(r, b, t)
    spread = distance_spread(found["baseline_error"] / np.sqrt(200), found["moved_sq"], found["moved_n"])
    assert (found["top1"] == 0).sum() > count_limit(flip_odds(found["margins"], spread), 1e-3)


def test_nothing_flips_without_error_and_half_of_all_ties_do_with_it() -> None:
    margins = np.array([[0.0, np.inf], [0.0, np.inf], [5.0, np.inf]])
    odds = flip_odds(margins, np.array([0.0, 1.0, 1.0]))
    assert odds[0] == 0.0
    assert odds[1] == pytest.approx(0.5, abs=1e-6)
    assert odds[2] == pytest.approx(2.87e-7, rel=0.02)


@given(st.integers(0, 300), st.floats(0.0, 1.0), st.sampled_from([1e-2, 1e-3, 1e-6]))
def test_the_limit_of_flips_is_the_binomial_one_for_equal_odds(n: int, p: float, tail: float) -> None:
    limit = count_limit(np.full(n, p), tail)
    assert binom.sf(limit, n, p) <= tail * (1 + 1e-6)
    assert limit == 0 or binom.sf(limit - 1, n, p) >= tail * (1 - 1e-6)


def test_a_large_vocabulary_is_read_in_bounded_memory() -> None:
    r, b, t = draw(8, n=24, width=151_936)
    tracemalloc.start()
    found = rows(r, b, t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found["kl"]) == 24
    assert peak < 160e6


@pytest.mark.parametrize(("error", "most_failures"), [(1.0, 2), (2.0, None)])
def test_clean_ports_rarely_fail_and_ports_with_twice_the_error_always_do(
    error: float, most_failures: int | None
) -> None:
    """Logits of hidden states with an error that differs from position to position, as those of a network do."""
    failures = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        head = generator.standard_normal((32, 200)) / 6
        hidden, scale = generator.standard_normal((96, 32)), np.exp(generator.normal(0.0, 0.8, (96, 1)))
        r = 4 * hidden @ head
        b, t = (
            (r + size * 0.05 * scale * generator.standard_normal((96, 32)) @ head).astype(ml_dtypes.bfloat16)
            for size in (1.0, error)
        )
        columns = rows(r.astype(np.float32), b, t) | {
            "prompt": np.repeat(np.arange(3), 32),
            "padding_wins": np.zeros(96),
        }
        runs = ComparedRuns("c", "r", "b", "t", Thresholds())
        measured = judged_rows(columns, runs, "decode", 200, "bfloat16")
        found = evaluate(Positions("all", measured, True, "bfloat16"), runs.thresholds)
        failures += any(item.verdict == "fail" for item in found)
    assert failures == 20 if most_failures is None else failures <= most_failures
