"""The interval of R: cluster bootstrap over tokens and prompts."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tensorsleuth.analyze.intervals import interval_over_prompts, interval_over_tokens


def tokens(rng: np.random.Generator, n: int, level: float = 1.0) -> np.ndarray:
    """Reference, baseline and target sums of squares; R is `level` on average, tokens differ by a common factor."""
    common = rng.lognormal(0, 1, n)
    return np.stack(
        [1e4 * common, common * rng.lognormal(0, 0.3, n), level**2 * common * rng.lognormal(0, 0.3, n)], axis=1
    )


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(low <= 1.3 <= high for low, high in (interval_over_tokens(tokens(rng, 64, 1.3)) for _ in range(300)))
    assert 0.86 <= hits / 300 <= 0.99


def test_prompts_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    prompts = [tokens(rng, 200, level) for level in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0)]
    low, high = interval_over_prompts(prompts)
    within_low, within_high = interval_over_tokens(np.concatenate(prompts))
    assert high - low > 2 * (within_high - within_low)
    assert interval_over_prompts(prompts[:4]) == interval_over_tokens(np.concatenate(prompts[:4]))


def test_the_interval_over_prompts_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = interval_over_prompts([tokens(rng, 40, 1.3) for _ in range(12)])
        hits += low <= 1.3 <= high
    assert 0.86 <= hits / 200 <= 1.0


def test_the_interval_is_reproducible_and_scale_free() -> None:
    sums = tokens(np.random.default_rng(0), 3000)
    assert interval_over_tokens(sums) == interval_over_tokens(sums)
    assert interval_over_tokens(sums * 2.0**-120) == pytest.approx(interval_over_tokens(sums), rel=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_tokens_have_no_interval(n: int) -> None:
    assert np.isnan(interval_over_tokens(np.ones((n, 3)))).all()
    assert np.isnan(interval_over_prompts([np.ones((n, 3))])).all()


def test_missing_and_zero_errors() -> None:
    sums = np.ones((10, 3))
    assert np.isnan(interval_over_tokens(sums * [1, np.nan, 1])).all()
    assert np.isnan(interval_over_tokens(sums * [1, 0, 0])).all()
    assert interval_over_tokens(sums) == pytest.approx((1.0, 1.0))


def test_thousands_of_sites_cost_little() -> None:
    sums = tokens(np.random.default_rng(0), 512)
    interval_over_tokens(sums)
    start = time.perf_counter()
    for _ in range(100):
        interval_over_tokens(sums)
    assert time.perf_counter() - start < 2.0
