"""The statistics behind verdicts: p-values, nulls from a few replicates, false discoveries, tolerance limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorsleuth.analyze.calibration.discovery import q_values
from tensorsleuth.analyze.calibration.exchange import exchange_p_value, sign_flip_p_value
from tensorsleuth.analyze.calibration.limits import limits_by_kind, nulls_by_kind, tolerance_limit
from tensorsleuth.analyze.calibration.null import null_of_replicates
from tensorsleuth.analyze.calibration.routing import Experts
from tensorsleuth.analyze.intervals import interval_over_prompts, interval_over_tokens
from tensorsleuth.analyze.verdict import ALPHA

Array = np.ndarray


def tokens(rng: np.random.Generator, n: int, tail: float = 1.5, r: float = 1.0) -> Array:
    """Reference, baseline and target sums of squares; magnitudes with a heavy tail that both errors share."""
    size = rng.lognormal(0, tail, n)
    return np.stack([1e4 * size, size * rng.chisquare(20, n), r**2 * size * rng.chisquare(20, n)], axis=1)


@pytest.mark.parametrize(("count", "tail"), [(9, 0.5), (40, 2.0), (400, 1.0)])
def test_the_sign_flip_tail_agrees_with_simulation(count: int, tail: float) -> None:
    rng = np.random.default_rng(count)
    d = rng.standard_normal(count) * rng.lognormal(0, tail, count) + 0.15
    signs = rng.choice([-1.0, 1.0], size=(25_000, count))
    assert sign_flip_p_value(d) == pytest.approx((signs @ np.abs(d) >= d.sum()).mean(), abs=0.012)


@given(st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), min_size=1, max_size=40), st.floats(1e-100, 1e100))
def test_sign_flip_p_values_are_probabilities_without_a_unit(values: list[float], scale: float) -> None:
    d = np.array(values)
    p = sign_flip_p_value(d)
    assert 0.5 ** len(d) <= p <= 1.0
    assert sign_flip_p_value(d * scale) == pytest.approx(p, rel=1e-6, abs=1e-12)
    assert p + sign_flip_p_value(-d) >= 1.0 - 1e-6


def test_p_values_of_clean_tokens_are_uniform_though_tails_are_heavy() -> None:
    rng = np.random.default_rng(0)
    p = np.array([exchange_p_value([tokens(rng, 60, 2.0)]) for _ in range(600)])
    for level in (0.01, 0.05, 0.5):
        assert (p <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / len(p))
    assert (p <= 0.5).mean() > 0.4


def test_one_token_with_a_huge_error_is_no_evidence_and_many_small_ones_are() -> None:
    rng = np.random.default_rng(1)
    clean = tokens(rng, 50, 0.3)
    flipped = clean.copy()
    flipped[7, 2] *= 1e4
    assert exchange_p_value([flipped]) > 0.2
    assert exchange_p_value([tokens(rng, 50, 0.3, r=1.25)]) < 1e-4


def test_prompts_have_to_agree() -> None:
    rng = np.random.default_rng(2)
    prompts = [tokens(rng, 30, 0.3, r) for r in (3.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
    assert exchange_p_value([np.concatenate(prompts)]) < 1e-3
    assert exchange_p_value(prompts) > 0.05


def test_a_few_tokens_that_agree_are_evidence() -> None:
    rng = np.random.default_rng(3)
    assert exchange_p_value([tokens(rng, 4, 1.0, r=3.0)]) < 0.05
    assert np.isnan(exchange_p_value([tokens(rng, 1)]))


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    """Within 3 points of 95 %: 200 tokens, and 12 prompts of 40 tokens whose R differs by prompt."""
    rng = np.random.default_rng(4)
    n = 1200
    inside = [low <= 1.3 <= high for low, high in (interval_over_tokens(tokens(rng, 200, 0.5, 1.3)) for _ in range(n))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)
    inside = []
    for _ in range(250):
        prompts = [tokens(rng, 40, 0.3, 1.3) * [1, 1, rng.lognormal(-0.005, 0.1)] for _ in range(12)]
        low, high = interval_over_prompts(prompts)
        inside.append(low <= 1.3 <= high)
    assert np.mean(inside) >= 0.92 - 2 * np.sqrt(0.95 * 0.05 / 250)


def replicated(
    rng: np.random.Generator, k: int, dependence: float, n_bad: int
) -> tuple[Array, Array, list[str], Array]:
    """log R of k replicates and of a target at 160 sites of 8 kinds, from log error norms of k + 2 clean runs.

    Neighbouring sites are correlated; their spreads differ by kind, and from site to site.
    """
    sites, which = 160, np.arange(160) % 8
    noise = rng.standard_normal((sites, k + 2))
    for site in range(1, sites):
        noise[site] = dependence * noise[site - 1] + np.sqrt(1 - dependence**2) * noise[site]
    scale = np.sqrt(4 / rng.chisquare(4, sites))[:, None]
    norms = 0.03 * np.exp(0.5 * rng.standard_normal(8))[which][:, None] * scale * noise
    bad = np.arange(sites) >= sites - n_bad
    target = norms[:, -1] - norms[:, 0] + 0.3 * bad
    return norms[:, 1 : k + 1] - norms[:, :1], target, [f"kind {n}" for n in which], bad


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dependence", [0.0, 0.95])
def test_false_discoveries_stay_below_the_nominal_rate(k: int, dependence: float) -> None:
    rng = np.random.default_rng(10 * k + int(10 * dependence))
    shares, power, n = [], [], 120
    for number in range(n):
        replicates, target, kinds, bad = replicated(rng, k, dependence, n_bad=40 * (number % 2))
        called = q_values(null_of_replicates(replicates, kinds).p_values(target)) <= ALPHA
        shares.append((called & ~bad).sum() / max(called.sum(), 1))
        if bad.any():
            power.append(called[bad].mean())
    assert np.mean(shares) <= ALPHA + 2 * np.std(shares) / np.sqrt(n)
    assert np.mean(power) > 0.8


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_false_discoveries_from_tokens_alone_stay_below_the_nominal_rate(shared: float) -> None:
    """60 sites, 15 of them wrong; heavy-tailed tokens, and sites that repeat the luck of their neighbours."""
    rng = np.random.default_rng(int(10 * shared))
    shares, power, n = [], [], 25
    for _ in range(n):
        luck = [rng.standard_normal((50, 2))]
        for _ in range(59):
            luck.append(shared * luck[-1] + np.sqrt(1 - shared**2) * rng.standard_normal((50, 2)))
        size = rng.lognormal(0, 1.5, 50)
        bad = np.arange(60) >= 45
        p = []
        for site, wrong in zip(luck, bad, strict=True):
            squares = size[:, None] * np.exp(0.5 * site) * [1.0, 9.0 if wrong else 1.0]
            p.append(exchange_p_value([np.column_stack([size, squares])]))
        called = q_values(np.array(p)) <= ALPHA
        shares.append((called & ~bad).sum() / max(called.sum(), 1))
        power.append(called[bad].mean())
    assert np.mean(shares) <= ALPHA + 2 * np.std(shares) / np.sqrt(n)
    assert np.mean(power) > 0.7


def test_a_replicate_that_repeats_the_baseline_tells_nothing() -> None:
    log_r = np.array([[0.0, 0.05], [0.0, 0.02], [0.0, 0.0], [0.0, -0.03]])
    both, one = (null_of_replicates(values, ["a"] * 4) for values in (log_r, log_r[:, 1:]))
    assert both.centre == pytest.approx(one.centre)
    assert both.scale == pytest.approx(one.scale)
    assert np.isfinite(both.scale).all()  # the third site borrows from the others
    nothing = null_of_replicates(np.zeros((3, 2)), ["a"] * 3)
    assert np.isnan(nothing.p_values(np.ones(3))).all()


def test_q_values_ignore_what_was_not_tested() -> None:
    q = q_values(np.array([0.001, np.nan, 0.04, 0.5]))
    assert q[[0, 2, 3]] == pytest.approx([0.003, 0.06, 0.5])
    assert np.isnan(q[1])


@pytest.mark.parametrize("n", [6, 30, 400])
def test_tolerance_limits_hold_with_95_percent_confidence(n: int) -> None:
    rng = np.random.default_rng(n)
    true = np.exp(0.05 + 0.08 * 2.3263)
    held = [tolerance_limit(np.exp(0.05 + 0.08 * rng.standard_normal(n))) >= true for _ in range(500)]
    assert np.mean(held) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 500)
    assert np.isnan(tolerance_limit(np.array([1.0])))


def test_kinds_of_few_observations_borrow_their_spread() -> None:
    rng = np.random.default_rng(5)
    observed = {f"kind {n}": np.exp(0.04 * rng.standard_normal(4)) for n in range(20)} | {"rare": np.array([1.02])}
    limits, nulls = limits_by_kind(observed), nulls_by_kind(observed)
    assert 1.05 < limits["rare"] < 1.6
    assert nulls["rare"].n == 1
    assert set(nulls) == {*observed, ""}


@pytest.mark.parametrize(
    ("module", "features", "dtype", "routes"),
    [
        ("layers.0.mlp.gate", 4, "bfloat16", True),
        ("layers.0.block_sparse_moe.router.layer", 4, "float32", True),
        ("layers.0.mlp.router", 2, "int64", True),
        ("layers.0.mlp.router", 2, "float32", False),
        ("layers.0.mlp.gate_proj", 4, "float32", False),
        ("layers.0.router.layer.norm", 4, "float32", False),
    ],
)
def test_routers_are_known_by_name_and_width(module: str, features: int, dtype: str, routes: bool) -> None:
    assert Experts(count=4, chosen=2).routed_by(module, features, dtype) == routes
