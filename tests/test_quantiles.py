"""Error quantiles are exact in bounded memory, and the QQ numbers follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.analyze import scan, selection
from tensorsleuth.analyze.measure import Triple, measure
from tensorsleuth.analyze.quantiles import PROBABILITIES, kolmogorov_smirnov, qq_numbers, wasserstein
from tensorsleuth.analyze.selection import InputChangedError


def triple(r: Any, b: Any, t: Any) -> Triple:
    return Triple(r, b, t, np.arange(len(r)))


def wide(array: Any) -> Any:
    return np.asarray(array).astype(np.float64).ravel()


def assert_exact(groups: dict[int, list[Triple]], threads: int = 1) -> None:
    records = measure(groups, threads=threads)
    for prompt, record in records.items():
        pieces = groups[prompt] if prompt is not None else [piece for g in groups.values() for piece in g]
        for side in ("baseline", "target"):
            errors = np.concatenate([wide(getattr(p, side)) - wide(p.reference) for p in pieces])
            expected = np.quantile(errors, PROBABILITIES) if errors.size else np.full(len(PROBABILITIES), np.nan)
            np.testing.assert_allclose(getattr(record.quantiles, side), expected, 1e-8, 0, err_msg=f"{prompt} {side}")


@pytest.fixture
def tiny_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 held values and 100 collected ones, so that small tensors take every path of a large one."""
    monkeypatch.setattr(scan, "HELD", 64)
    monkeypatch.setattr(selection, "HELD", 64)
    monkeypatch.setattr(selection, "COLLECT_LIMIT", 100)


def values(kind: str, rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Any:
    """float64 errors of one kind of distribution."""
    normal = rng.standard_normal(shape)
    with np.errstate(over="ignore"):
        return {
            "normal": normal * scale,
            "mostly zero": np.where(rng.random(shape) < 0.9, 0.0, normal * scale),
            "offset": scale * (1 + 1e-9 * normal),
            "integers": np.round(normal * 3),
            "constant": np.full(shape, scale),
            "heavy tails": normal * scale * 10.0 ** rng.integers(-60, 60, shape),
            "denormal": np.round(normal * 9) * 5e-324,
            "beyond float32": normal * 1e200,
            "signed zeros": np.where(normal > 0, 0.0, -0.0),
        }[kind]


KINDS = (
    "normal",
    "mostly zero",
    "offset",
    "integers",
    "constant",
    "heavy tails",
    "denormal",
    "beyond float32",
    "signed zeros",
)


@pytest.mark.usefixtures("tiny_memory")
@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 200)), min_size=1, max_size=4),
    st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    st.integers(-30, 30),
    st.integers(1, 2),
)
def test_quantiles_are_those_of_numpy_in_bounded_memory(
    seed: int, shapes: list[tuple[int, int]], kinds: tuple[str, str], power: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = {
        prompt: [triple(np.zeros(shape), *(values(kind, rng, shape, 10.0**power) for kind in kinds))]
        for prompt, shape in enumerate(shapes)
    }
    assert_exact(groups, threads)


@pytest.mark.parametrize("kind", KINDS)
def test_large_errors_are_exact_too(kind: str) -> None:
    rng = np.random.default_rng(0)
    shape = (300, 1000)
    assert_exact({p: [triple(np.zeros(shape), *(values(kind, rng, shape, 1e-3) for _ in "bt"))] for p in (1, 2)})


def test_bf16_activations_are_exact_with_every_thread() -> None:
    rng = np.random.default_rng(0)
    r = rng.standard_normal((600, 4096)).astype(np.float32)
    b, t = r.astype(ml_dtypes.bfloat16), (r * 1.01).astype(ml_dtypes.bfloat16)
    assert_exact({0: [triple(r, b, t)]}, threads=2)


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_masked_elements_take_no_part(rows: int) -> None:
    r = np.random.default_rng(0).standard_normal((rows, 100))
    b, t = r + 1.0, r * 2
    mask = np.random.default_rng(1).random(r.shape) < 0.3
    for x in (r, b, t):
        x[mask] = -np.inf
    errors = t[~mask] - r[~mask]
    record = measure({0: [triple(r, b, t)]})[0]
    assert record.quantiles is not None
    assert record.n == (~mask).sum()
    np.testing.assert_allclose(record.quantiles.target, np.quantile(errors, PROBABILITIES), 1e-8)


def test_tensors_that_change_between_passes_are_noticed() -> None:
    rng = np.random.default_rng(0)
    r = np.zeros((100, 1000))
    opened = []

    def triples() -> Iterator[Triple]:
        opened.append(1)
        yield triple(r, rng.standard_normal(r.shape), rng.standard_normal(r.shape))

    with pytest.raises(InputChangedError, match="changed while being read"):
        measure({0: triples})
    assert len(opened) == 2


def test_the_grid_is_symmetric_and_dense_in_the_tails() -> None:
    assert (PROBABILITIES[0], PROBABILITIES[-1], len(PROBABILITIES)) == (0.0, 1.0, 149)
    assert (np.diff(PROBABILITIES) > 0).all()
    np.testing.assert_allclose(PROBABILITIES + PROBABILITIES[::-1], 1.0, rtol=0, atol=1e-15)
    assert PROBABILITIES[1] == 1e-6


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (3.0, 0.0), (0.5, 2.0)])
def test_qq_numbers_of_a_stretched_and_shifted_distribution(scale: float, shift: float) -> None:
    baseline = 2.0 * np.random.default_rng(0).standard_normal(200_000)
    b = np.quantile(baseline, PROBABILITIES)
    qq = qq_numbers(b, scale * b + shift, float(baseline.std()))
    assert qq.slope == pytest.approx(scale, rel=1e-9)
    assert qq.intercept == pytest.approx(shift / 2.0, rel=1e-2, abs=1e-9)
    exact = np.abs((scale - 1) * np.sort(baseline) + shift).mean() / baseline.std()
    assert qq.w1 == pytest.approx(exact, rel=5e-3, abs=1e-9)


def test_outliers_do_not_move_the_line() -> None:
    rng = np.random.default_rng(0)
    b, t = rng.standard_normal(100_000), rng.standard_normal(100_000)
    t[:500] *= 1e6
    qq = qq_numbers(np.quantile(b, PROBABILITIES), np.quantile(t, PROBABILITIES), 1.0)
    assert qq.slope == pytest.approx(1.0, abs=0.02)
    assert qq.w1 > 100


def test_ks_is_within_the_grids_resolution_of_the_exact_one() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    b = rng.standard_normal(50_000)
    for t in (b, b * 3, b + 0.5, rng.standard_t(2, 50_000), np.where(rng.random(50_000) < 0.4, 0, b)):
        found = kolmogorov_smirnov(np.quantile(b, PROBABILITIES), np.quantile(t, PROBABILITIES))
        assert found == pytest.approx(stats.ks_2samp(b, t).statistic, abs=0.01)


def test_equal_atoms_are_no_distance() -> None:
    atoms = np.repeat([-1.0, 0.0, 1.0], [10, 129, 10])
    assert kolmogorov_smirnov(atoms, atoms) == 0.0
    assert wasserstein(atoms, atoms) == 0.0
    assert np.isnan(qq_numbers(np.zeros(149), atoms, 0.0).slope)
