"""Change points: exact against brute force and an independent library, kinds, and what the intervals promise."""

from __future__ import annotations

import math
import time
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorsleuth.analyze.localization.change_points import (
    LEAST_DISPERSION,
    change_points,
    dispersion_of,
    penalty_of,
)
from tensorsleuth.analyze.localization.segmentation import WeightedSums, place_interval, segment

Signal = npt.NDArray[np.float64]


def cost(values: Signal, weights: Signal) -> float:
    mean = (weights * values).sum() / weights.sum()
    return float((weights * (values - mean) ** 2).sum())


def total(values: Signal, weights: Signal, starts: list[int], penalty: float) -> float:
    edges = [0, *starts, len(values)]
    return sum(cost(values[a:b], weights[a:b]) for a, b in pairwise(edges)) + penalty * len(starts)


def brute_force(values: Signal, weights: Signal, penalty: float) -> float:
    places = range(1, len(values))
    every = (list(starts) for k in range(len(values)) for starts in combinations(places, k))
    return min(total(values, weights, starts, penalty) for starts in every)


def test_segmentation_has_the_least_cost_of_all_on_500_random_signals() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        n = int(rng.integers(1, 9))
        values = rng.normal(size=n) + 3.0 * rng.integers(0, 2, n).cumsum()
        weights, penalty = rng.uniform(0.2, 3.0, n), float(rng.uniform(0.0, 5.0))
        found = total(values, weights, segment(values, weights, penalty), penalty)
        assert found == pytest.approx(brute_force(values, weights, penalty), rel=1e-9, abs=1e-9)


def test_segmentation_agrees_with_ruptures() -> None:
    ruptures = pytest.importorskip("ruptures", reason="needs ruptures: pip install ruptures")
    rng = np.random.default_rng(1)
    for _ in range(10):
        values = rng.normal(size=60) + np.repeat(rng.normal(0, 4, 6), 10)
        search = ruptures.Pelt(model="l2", jump=1, min_size=1).fit(values)
        assert segment(values, np.ones(60), 8.0) == search.predict(pen=8.0)[:-1]


@given(
    st.lists(st.floats(-8.0, 8.0), min_size=2, max_size=40),
    st.floats(0.0, 20.0),
    st.floats(0.1, 50.0),
    st.floats(-100.0, 100.0),
)
def test_segmentation_does_not_depend_on_units(values: list[float], penalty: float, scale: float, shift: float) -> None:
    signal = np.round(np.array(values), 3)
    weights = np.ones(len(signal))
    moved = segment(scale * signal + shift, weights / scale**2, penalty)
    assert total(signal, weights, moved, penalty) == pytest.approx(
        total(signal, weights, segment(signal, weights, penalty), penalty), rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize("n", [3, 4, 7, 12, 40])
def test_few_signals_without_a_change_get_one(n: int) -> None:
    rng = np.random.default_rng(n)
    found = 0
    for _ in range(200):
        spread = rng.uniform(0.02, 0.2, n)
        values = rng.normal(size=n) * np.sqrt(spread**2 + 0.1**2)
        found += bool(change_points(values, spread))
    assert found / 200 <= 0.07


@pytest.mark.parametrize(("n", "at"), [(3, 1), (3, 2), (12, 6), (12, 11), (60, 59)])
def test_a_fault_is_a_step_wherever_it_is_even_at_the_last_site(n: int, at: int) -> None:
    rng = np.random.default_rng(7)
    values = 0.03 * rng.normal(size=n)
    values[at:] += math.log(3.0)
    (change,) = change_points(values, np.full(n, 0.02))
    assert (change.kind, change.index, change.low, change.high) == ("step", at, at, at)
    assert change.change == pytest.approx(math.log(3.0), abs=0.1)


def test_a_spike_returns_and_is_listed_once() -> None:
    values = 0.03 * np.random.default_rng(0).normal(size=40)
    values[20:22] += 2.0
    (change,) = change_points(values, np.zeros(40))
    assert (change.kind, change.index) == ("spike", 20)


def test_a_step_that_falls_back_only_later_is_a_step_up_and_a_step_down() -> None:
    values = 0.03 * np.random.default_rng(0).normal(size=40)
    values[10:25] += 2.0
    found = change_points(values, np.zeros(40))
    assert [(change.kind, change.index, change.change > 0) for change in found] == [
        ("step", 10, True),
        ("step", 25, False),
    ]


def test_slow_growth_is_one_drift_and_not_a_staircase() -> None:
    noise = 0.04 * np.random.default_rng(0).normal(size=80)
    values = noise + np.concatenate([np.zeros(20), np.linspace(0.0, 2.0, 60)])
    (change,) = change_points(values, np.zeros(80))
    assert change.kind == "drift"
    assert 15 <= change.index <= 32
    assert change.high == 79
    assert change.change == pytest.approx(1.85, abs=0.3)


def test_two_levels_are_no_drift() -> None:
    values = np.repeat([0.0, 1.0, 2.5], 15) + 0.04 * np.random.default_rng(3).normal(size=45)
    assert [(change.kind, change.index) for change in change_points(values, np.zeros(45))] == [
        ("step", 15),
        ("step", 30),
    ]


def test_uncertain_sites_weigh_less() -> None:
    values, spread = np.zeros(30), np.full(30, 0.02)
    values[12] = 1.0
    assert change_points(values, spread)
    spread[12] = 0.8
    assert change_points(values, spread) == []


def test_the_interval_of_the_place_holds_it_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    trials = 1500
    for _ in range(trials):
        at = int(rng.integers(5, 35))
        values = rng.normal(size=40) + np.where(np.arange(40) >= at, 1.5, 0.0)
        sums = WeightedSums(values, np.ones(40))
        places = np.arange(1, 40)
        best = int(places[np.argmin(sums.cost(0, places) + sums.cost(places, 40))])
        low, high = place_interval(sums, 0, 40, best)
        assert low <= best <= high
        inside += low <= at <= high
        widths.append(high - low)
    assert 0.93 <= inside / trials <= 0.99
    assert np.median(widths) <= 10


def test_dispersion_ignores_changes_and_subtracts_what_the_intervals_explain() -> None:
    rng = np.random.default_rng(0)
    spread = np.full(4000, 0.3)
    values = rng.normal(size=4000) * np.hypot(0.3, 0.2) + np.repeat([0.0, 3.0, -2.0, 5.0], 1000)
    assert dispersion_of(values, spread) == pytest.approx(0.2, rel=0.15)
    assert dispersion_of(np.zeros(50), np.zeros(50)) == LEAST_DISPERSION


def test_ten_thousand_sites_take_seconds() -> None:
    values = 0.1 * np.random.default_rng(0).normal(size=10_000)
    values[7_000:] += 1.0
    started = time.process_time()
    (change,) = change_points(values, np.zeros(10_000))
    assert time.process_time() - started < 10.0
    assert change.index == 7_000


@pytest.mark.parametrize("n", [0, 1, 2])
def test_almost_nothing_has_no_change(n: int) -> None:
    assert change_points(np.zeros(n), np.zeros(n)) == []


def test_the_penalty_grows_with_the_number_of_places() -> None:
    assert penalty_of(100) - penalty_of(10) == pytest.approx(2 * math.log(10))
