"""Pictures that read values: error histograms, maps of tensors, and next-token distributions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy_runs import Array, Tensor, add_run
from PIL import Image
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.logits import judge_logits
from tensorsleuth.analyze.plotting.histogram import EDGES, ErrorCounts, error_histogram
from tensorsleuth.analyze.plotting.logits import logit_map
from tensorsleuth.analyze.plotting.source import choose_site, compared, site_results
from tensorsleuth.analyze.plotting.tensor import MOST_CELLS, compared_map, stored_map
from tensorsleuth.cli.app import main
from tensorsleuth.store import Trace

TOKENS = {0: list(range(12)), 1: list(range(20, 32))}
HOT, WIDTH = 7, 700


def values(seed: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal((2, 11, WIDTH))).astype(np.float32)


R = values(0)
B, T = R + values(1, 0.01), R + values(2, 0.01)
T[:, :, HOT] += 3.0
T[1, 4] += values(3, 0.5)[0, 0]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A comparison whose target has a hot feature, and one position of prompt 1 that is off."""
    trace = Trace.create(tmp_path_factory.mktemp("plots") / "trace")
    for run, side, role in (("r", R, "reference"), ("b", B, "baseline"), ("t", T, "target")):
        recorded = [Tensor("lm_head", side[p, None], prompt=p, dims="b s v") for p in range(2)]
        add_run(trace, run, recorded, role=role, tokens=TOKENS)
    compare(trace, ComparisonRequest("r", "t", "b"))
    return trace


@given(arrays(np.float64, st.integers(0, 50), elements=st.floats(-1e30, 1e30)))
def test_every_error_is_counted_in_the_bin_that_holds_it(errors: Array) -> None:
    counts = ErrorCounts.of(errors)
    inside = np.abs(errors[(np.abs(errors) > EDGES[1]) & (errors != 0)])
    expected = np.histogram(inside, EDGES)[0][8:]
    np.testing.assert_array_equal(counts.magnitudes[8:], expected)
    assert (counts.n, counts.zero) == (errors.size, int((errors == 0).sum()))
    assert counts.negative.sum() == (errors < 0).sum()


def test_an_outlier_takes_no_resolution_from_the_other_errors() -> None:
    errors = np.random.default_rng(0).standard_normal(100_000)
    shared = np.append(errors, 1e12), np.append(3.0 * errors, 1e12)
    shares = [ErrorCounts.of(side).magnitudes / len(side) for side in shared]
    alone = [ErrorCounts.of(side).magnitudes / len(errors) for side in (errors, 3.0 * errors)]
    apart = [np.sqrt(first * second).sum() for first, second in (shares, alone)]
    assert apart[0] == pytest.approx(apart[1], abs=1e-3)
    assert apart[0] < 0.9


def test_the_histogram_of_a_site_counts_every_element_of_both_runs(trace: Trace) -> None:
    source = compared(trace)
    found = error_histogram(trace, source, choose_site(site_results(trace, source), source))
    assert found.baseline is not None
    assert found.baseline.n == found.target.n == R.size
    difference = np.float64(T) - R
    assert found.target.negative.sum() == (difference < 0).sum()
    assert found.target.zero == (difference == 0).sum()


def test_a_map_names_the_hot_feature_and_keeps_its_extreme_however_it_is_pooled(trace: Trace) -> None:
    source = compared(trace)
    found = compared_map(trace, source, choose_site(site_results(trace, source), source), 1)
    baseline, target = found.maps
    assert target.values.shape[1] <= MOST_CELLS < WIDTH
    assert (int(target.by_feature.argmax()), int(target.by_position.argmax())) == (HOT, 4)
    error = np.float64(T[1]) - R[1]
    assert np.abs(target.values).max() == np.abs(error).max()
    np.testing.assert_allclose(target.by_feature, np.sqrt((error**2).mean(axis=0)))
    assert baseline.by_feature.max() < 0.1


def test_one_stored_tensor_is_drawn_as_it_is(trace: Trace) -> None:
    tensor = trace.query("SELECT tensor_id FROM tensors WHERE run = 't' AND prompt = 1").to_pylist()[0]["tensor_id"]
    found = stored_map(trace, tensor)
    assert found.first_position == 0
    np.testing.assert_allclose(found.maps[0].by_position, np.sqrt((np.float64(T[1]) ** 2).mean(axis=1)))


def test_logits_are_drawn_where_they_were_judged(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if trace.query("SELECT count(*) AS n FROM logits").to_pylist() == [{"n": 0}]:
        assert main(["plot", "logits", str(trace.path)]) == 2
        assert "run 'sleuth logits" in capsys.readouterr().err
    judge_logits(trace, "t")
    found = logit_map(trace, compared(trace))
    assert found.kl.shape == (2, 11)
    assert found.failing[1, 4]


@pytest.mark.parametrize("what", ["histogram", "tensor", "logits"])
def test_the_command_writes_the_same_picture_for_the_same_numbers(
    trace: Trace, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge_logits(trace, "t")
    for name in ("first", "second"):
        assert main(["plot", what, str(trace.path), "-o", str(tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert len(np.unique(np.asarray(Image.open(tmp_path / "first.png").convert("RGB")).reshape(-1, 3), axis=0)) > 20
    capsys.readouterr()
    assert main(["plot", what, str(trace.path), "-o", str(tmp_path / "third.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plot"].endswith("third.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tensor", "--prompt", "9"], "its prompts: 0, 1"),
        (["tensor", "--what", "nothing"], "choose one of error"),
        (["tensor", "--id", "5"], "no tensor 5"),
        (["histogram", "--site", "mlp"], "no site 'mlp'"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(
    trace: Trace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    assert main(["plot", command, str(trace.path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_do_not_stop_a_picture(tmp_path: Path, bad: float) -> None:
    trace = Trace.create(tmp_path / "trace")
    broken = T.copy()
    broken[0, 2, 3:5] = bad
    for run, side, role in (("r", R, "reference"), ("b", B, "baseline"), ("t", broken, "target")):
        add_run(trace, run, [Tensor("mlp", side[:1])], role=role, tokens={0: TOKENS[0]})
    compare(trace, ComparisonRequest("r", "t", "b"))
    for what in ("histogram", "tensor"):
        assert main(["plot", what, str(trace.path), "-o", str(tmp_path / f"{what}.png")]) == 0
    source = compared(trace)
    found = compared_map(trace, source, choose_site(site_results(trace, source), source))
    assert np.isnan(found.maps[1].values).sum() in (1, 2)
