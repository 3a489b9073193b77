"""Published ports and their published numbers: tensors drawn with the same moments are judged as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy_runs import Tensor, add_run
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.localization.suspects import suspects
from tensorsleuth.analyze.measure import Measurement, Triple, measure
from tensorsleuth.store import Trace

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "published_cases.json").read_text())
POSITIONS, FEATURES = 32, 64
#: Where QQ numbers begin to differ: the worst published good sample is at 0.025, the best bad one at 0.15.
W1_LIMIT = 0.08

Array = npt.NDArray[np.float64]


def errors(
    rng: np.random.Generator, mean: float, sd: float, shape: tuple[int, ...] = (1, POSITIONS, FEATURES)
) -> Array:
    """Normal errors with exactly this mean and standard deviation."""
    drawn = rng.standard_normal(shape)
    return mean + sd * (drawn - drawn.mean()) / drawn.std()


def record(trace: Trace, sites: list[tuple[str, float, float]]) -> None:
    """Three runs whose sites have the given root-mean-square errors in the baseline and the target."""
    rng = np.random.default_rng(0)
    reference = {name: rng.standard_normal((1, POSITIONS, FEATURES)) for name, *_ in sites}
    runs = {
        "fp32": reference,
        "bf16": {name: reference[name] + errors(rng, 0.0, baseline) for name, baseline, _ in sites},
        "port": {name: reference[name] + errors(rng, 0.0, target) for name, _, target in sites},
    }
    for run, role in (("fp32", "reference"), ("bf16", "baseline"), ("port", "target")):
        tensors = [
            Tensor(name.partition("[")[0], array, order=order, slot=name.partition("[")[2].rstrip("]"))
            for order, (name, array) in enumerate(runs[run].items())
        ]
        add_run(trace, run, tensors, role=role, tokens={0: range(POSITIONS)}, n_prompt=POSITIONS)
    compare(trace, ComparisonRequest("fp32", "port", "bf16", "c"))


def verdicts(trace: Trace) -> dict[str, str]:
    rows = trace.query("SELECT site, verdict FROM measurements WHERE comparison = 'c' AND prompt IS NULL").to_pylist()
    return {row["site"]: row["verdict"] for row in rows}


def test_the_component_table_is_judged_and_its_faults_are_named_in_order(trace: Trace) -> None:
    cases = CASES["components"]
    record(trace, [(case["name"], 1e-3, 1e-3 * case["r"]) for case in cases])
    found = verdicts(trace)
    assert {name for name, verdict in found.items() if verdict == "fail"} == {c["name"] for c in cases if c["fault"]}
    origins = [one.site for one in suspects(trace, "c") if one.kind in ("origin", "spike")]
    assert set(origins) == {"rmsnorm", "rotary_emb[0]", "mlp.experts"}
    assert "mlp" not in origins


def test_the_component_table_after_the_patches_is_clean(trace: Trace) -> None:
    record(trace, [(case["name"], 1e-3, 1e-3 * case.get("after", case["r"])) for case in CASES["components"]])
    assert set(verdicts(trace).values()) == {"pass"}
    assert suspects(trace, "c") == []


def test_whole_models_are_judged_on_both_sides_of_the_patches(trace: Trace) -> None:
    cases = CASES["whole_model"]
    record(trace, [(f"state.{number}", 1e-2, 1e-2 * case["r"]) for number, case in enumerate(cases)])
    found = verdicts(trace)
    for number, case in enumerate(cases):
        assert (found[f"state.{number}"] == "fail") == case["fault"], case["name"]


def test_the_one_layer_table_names_the_norm_and_not_the_larger_layer_behind_it(trace: Trace) -> None:
    record(trace, [(case["name"], case["baseline"], case["target"]) for case in CASES["one_layer"]])
    first, second = suspects(trace, "c")[:2]
    assert (first.site, first.kind) == (CASES["one_layer_origin"], "origin")
    assert first.r_ratio == pytest.approx(12734, rel=0.01)
    assert (second.site, second.kind) == ("layers.0.mlp", "inherited")
    assert second.r_ratio == pytest.approx(1303, rel=0.01)


def sample(case: dict[str, Any]) -> Measurement:
    rng = np.random.default_rng(1)
    shape = (64, 256)
    reference = rng.standard_normal(shape)
    baseline, target = (reference + errors(rng, *case[side], shape=shape) for side in ("baseline", "target"))
    return measure({0: [Triple(reference, baseline, target, np.arange(64))]})[None]


@pytest.mark.parametrize("case", CASES["qq"], ids=lambda case: case["name"])
def test_qq_numbers_tell_every_bad_sample_from_the_good_one(case: dict[str, Any]) -> None:
    found = sample(case)
    assert found.r_ratio == pytest.approx(case["r"], rel=0.05)
    assert (found.qq_w1 < W1_LIMIT) == case["good"]


def test_r_alone_lets_most_of_the_bad_samples_pass() -> None:
    bad = [sample(case).r_ratio for case in CASES["qq"] if not case["good"]]
    assert sum(r < 1.2 for r in bad) >= 4


def test_a_norm_with_a_rounded_variance_is_found_and_an_unrounded_product_is_not() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")

    def rounded(values: Array) -> Array:
        return np.asarray(values.astype(ml_dtypes.bfloat16).astype(np.float64))

    rng = np.random.default_rng(0)
    x = rounded(rng.standard_normal((64, 2880)))
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True))
    variance = rounded((x**2).mean(-1, keepdims=True))
    port = rounded(x * rounded(1 / np.sqrt(variance)))
    norm = measure({0: [Triple(exact, rounded(exact), port, np.arange(64))]})[None]
    assert norm.r_ratio > 1.2
    assert norm.r_low > 1.0
    weight = rounded(rng.standard_normal((256, 256)) / 16)
    inputs = x[:, :256] + 1e-3 * rng.standard_normal((64, 256))
    product, inexact = inputs @ weight, rounded(inputs) @ weight
    linear = measure({0: [Triple(product, rounded(inexact), inexact, np.arange(64))]})[None]
    assert linear.r_ratio < 1.0
