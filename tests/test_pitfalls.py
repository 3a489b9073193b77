"""Ways in which other tools were seen to misjudge a port, each done right here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy_runs import Tensor, add_run
from tensorsleuth.analyze.compare import ComparisonRequest, ComparisonSummary, compare
from tensorsleuth.analyze.localization.suspects import suspects
from tensorsleuth.analyze.logits import judge_logits
from tensorsleuth.analyze.measure import Measurement, Triple, measure
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.store import Trace
from transformers import AutoConfig, AutoModelForCausalLM

Array = npt.NDArray[np.float32]
POSITIONS, VOCABULARY = 96, 300


def one(
    reference: npt.NDArray[np.generic], baseline: npt.NDArray[np.generic], target: npt.NDArray[np.generic]
) -> Measurement:
    return measure({0: [Triple(reference, baseline, target, np.arange(len(reference)))]})[None]


def three_runs(trace: Trace, values: tuple[Array, Array, Array], module: str = "lm_head") -> ComparisonSummary:
    for run, role, array in zip(("fp32", "bf16", "port"), ("reference", "baseline", "target"), values, strict=True):
        n = array.shape[0]
        add_run(
            trace, run, [Tensor(module, array[None])], role=role, tokens={0: range(n)}, n_prompt=n, dtype="bfloat16"
        )
    return compare(trace, ComparisonRequest("fp32", "port", "bf16", "c"))


def logits(seed: int = 0) -> tuple[Array, Array, Array]:
    """Logits of mean -8 and standard deviation 2.5, as language models have, and two roundings of them."""
    rng = np.random.default_rng(seed)
    exact = (2.5 * rng.standard_normal((POSITIONS, VOCABULARY)) - 8).astype(np.float32)
    noisy = [(exact + 0.02 * rng.standard_normal(exact.shape)).astype(ml_dtypes.bfloat16) for _ in range(2)]
    return exact, noisy[0], noisy[1]


@pytest.fixture(scope="module")
def itself(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Trace:
    """A model in FP32 that writes a continuation, in BF16, and in BF16 once more as the port."""
    folder = tmp_path_factory.mktemp("itself")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder("llama"))).save_pretrained(folder / "m")
    trace = Trace.create(folder / "trace")
    source = ModelSource(folder / "m")
    prompts = [PromptInput(str(n), token_ids=tuple(range(1 + n, 12 + n))) for n in range(2)]
    first = HuggingFaceCapture(source, "fp32", "reference", prompts=prompts, generation=Generation(6))
    capture_hugging_face(trace, first)
    for run, role in (("bf16", "baseline"), ("port", "target")):
        capture_hugging_face(trace, HuggingFaceCapture(source, run, role, "bfloat16", teacher="fp32"))
    compare(trace, ComparisonRequest("fp32", "port", "bf16", "c"))
    return trace


def test_a_model_compared_with_itself_is_perfect(itself: Trace) -> None:
    rows = itself.query(
        "SELECT r_ratio, state, verdict FROM measurements WHERE comparison = 'c' AND prompt IS NULL"
    ).to_pylist()
    assert {row["verdict"] for row in rows} == {"pass"}
    ratios = [row["r_ratio"] for row in rows if row["state"] == "measured"]
    assert ratios
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-8)
    assert suspects(itself, "c") == []


def test_every_forced_token_counts_and_the_logits_agree_with_the_baseline(itself: Trace) -> None:
    report = judge_logits(itself, "c")
    rows = itself.query("SELECT cosine, cosine_baseline, kl, kl_baseline, top1, top1_baseline FROM logits").to_pylist()
    assert report.verdict == "pass"
    assert len(rows) >= 2 * 6
    for row in rows:
        assert row["cosine"] > 0.999
        assert (row["kl"], row["top1"]) == (row["kl_baseline"], row["top1_baseline"])


def test_correct_logits_pass(trace: Trace) -> None:
    assert three_runs(trace, logits()).verdict == "pass"
    assert judge_logits(trace, "c").verdict == "pass"


def test_permuted_logits_fail_though_their_raw_cosine_is_high(trace: Trace) -> None:
    exact, noisy, _ = logits()
    permuted = np.random.default_rng(1).permuted(exact, axis=1).astype(ml_dtypes.bfloat16)
    three_runs(trace, (exact, noisy, permuted))
    assert judge_logits(trace, "c").verdict == "fail"
    row = trace.query("SELECT median(cosine) AS centred, median(cosine_raw) AS raw FROM logits").to_pylist()[0]
    assert row["raw"] > 0.85
    assert abs(row["centred"]) < 0.1


def test_four_bad_positions_of_96_are_seen(trace: Trace) -> None:
    exact, noisy, target = logits()
    rng = np.random.default_rng(2)
    bad = [3, 31, 60, 95]
    target[bad] = rng.permuted(target[bad], axis=1)
    three_runs(trace, (exact, noisy, target))
    assert judge_logits(trace, "c").verdict == "fail"
    worst = trace.query("SELECT position FROM logits ORDER BY kl DESC LIMIT 4").to_pylist()
    assert sorted(row["position"] for row in worst) == bad


def test_a_divergence_of_nine_tenths_of_a_nat_fails(trace: Trace) -> None:
    exact, noisy, _ = logits()
    flat = (exact * 0.45).astype(ml_dtypes.bfloat16)
    three_runs(trace, (exact, noisy, flat))
    assert judge_logits(trace, "c").verdict == "fail"
    assert trace.query("SELECT min(kl) AS kl FROM logits").to_pylist()[0]["kl"] > 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "infinity"])
def test_values_that_are_no_numbers_are_a_finding_and_never_replaced(trace: Trace, value: float) -> None:
    exact, noisy, target = logits()
    target[40, 7] = value
    assert three_runs(trace, (exact, noisy, target)).verdict == "fail"
    (first, *_) = suspects(trace, "c")
    assert (first.site, first.r_ratio) == ("lm_head", None)
    states = trace.query("SELECT state FROM measurements WHERE comparison = 'c' AND prompt IS NULL").to_pylist()
    assert states == [{"state": "nonfinite"}]


def test_arrays_of_different_shapes_are_refused_and_not_broadcast() -> None:
    exact = np.random.default_rng(0).standard_normal((24, 32))
    for wrong in (exact.T, exact[:, :1], exact.reshape(1, -1)):
        with pytest.raises(ValueError, match="align them first"):
            one(exact, exact, np.ascontiguousarray(wrong))


@pytest.mark.parametrize("layout", ["one feature", "transposed"])
def test_tensors_of_another_shape_fail(trace: Trace, layout: str) -> None:
    exact = np.random.default_rng(0).standard_normal((1, 24, 32)).astype(np.float32)
    wrong = exact[:, :, :1] if layout == "one feature" else np.ascontiguousarray(exact.transpose(0, 2, 1))
    start = 0 if layout == "one feature" else None
    runs = {"fp32": exact, "bf16": exact + np.float32(1e-3), "port": wrong}
    for run, role in (("fp32", "reference"), ("bf16", "baseline"), ("port", "target")):
        add_run(trace, run, [Tensor("layer", runs[run], start)], role=role, tokens={0: range(24)}, n_prompt=24)
    assert compare(trace, ComparisonRequest("fp32", "port", "bf16", "c")).verdict == "fail"
    assert suspects(trace, "c")[0].site == "layer"


def test_bf16_tensors_are_measured_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((32, 64)).astype(np.float32)
    narrow = exact.astype(ml_dtypes.bfloat16)
    assert one(exact, narrow, narrow).r_ratio == pytest.approx(1.0, abs=1e-8)


def test_a_zero_baseline_has_a_state_of_its_own() -> None:
    exact = np.random.default_rng(0).standard_normal((16, 32))
    assert one(exact, exact, exact).state == "exact"
    inexact = one(exact, exact, exact + 1e-9)
    assert (inexact.state, inexact.r_ratio) == ("baseline_exact", np.inf)


def test_an_outlier_that_all_runs_share_does_not_hide_a_threefold_inflation() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((32, 32))
    b, t = rng.standard_normal((2, 32, 32)) * 1e-3
    t *= 3
    b[5, 5] = t[5, 5] = 1.0
    found = one(exact, exact + b, exact + t)
    assert found.r_ratio < 1.01
    assert found.qq_slope == pytest.approx(3.0, rel=0.15)
    assert found.qq_w1 > 1.0
    assert found.ks > 0.2


def test_equal_distributions_of_a_thousand_errors_are_equal() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        exact = rng.standard_normal((32, 32))
        b, t = rng.standard_normal((2, 32, 32)) * 1e-3
        found = one(exact, exact + b, exact + t)
        assert found.r_ratio < 1.2
        assert found.qq_slope == pytest.approx(1.0, abs=0.15)
        assert found.qq_w1 < 0.15
