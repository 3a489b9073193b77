"""Comparing runs: alignment by position, states, verdicts, coverage, and numbers that plain numpy agrees with."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy_runs import Array, Tensor, add_run
from tensorsleuth.analyze.compare import ComparisonRequest, ComparisonSummary, compare
from tensorsleuth.analyze.verdict import Thresholds
from tensorsleuth.store import InputError, IntegrityError, Trace, TraceNotFoundError

TOKENS = {0: list(range(12))}
POSITIONS, WIDTH = 11, 64


def signal(seed: int, positions: int = POSITIONS, width: int = WIDTH) -> Array:
    return np.random.default_rng(seed).standard_normal((1, positions, width)).astype(np.float32)


def noisy(values: Array, seed: int, scale: float = 1e-3) -> Array:
    return (values + scale * signal(seed, values.shape[1], values.shape[2])).astype(np.float32)


R = signal(0)
B, T = noisy(R, 1), noisy(R, 2)


def judge(trace: Trace, reference: Array, baseline: Array, target: Array, **options: object) -> dict[str, object]:
    """Compare one site and return its measurement."""
    add_run(trace, "r", [Tensor("mlp", reference)], role="reference", tokens=TOKENS)
    add_run(trace, "b", [Tensor("mlp", baseline)], role="baseline", tokens=TOKENS)
    add_run(trace, "t", [Tensor("mlp", target)], tokens=TOKENS)
    compare(trace, ComparisonRequest("r", "t", "b", **options))  # type: ignore[arg-type]
    return one(trace)


def one(trace: Trace, phase: str = "prefill") -> dict[str, object]:
    rows = trace.query("SELECT * FROM measurements WHERE prompt IS NULL AND phase = ?", [phase]).to_pylist()
    assert len(rows) == 1
    return dict(rows[0])


def run_compare(trace: Trace, **options: object) -> ComparisonSummary:
    return compare(trace, ComparisonRequest("r", "t", "b", **options))  # type: ignore[arg-type]


def test_numbers_agree_with_numpy(trace: Trace) -> None:
    row = judge(trace, R, B.astype(ml_dtypes.bfloat16), T.astype(ml_dtypes.bfloat16))
    r, b, t = (x.astype(np.float64) for x in (R, B.astype(ml_dtypes.bfloat16), T.astype(ml_dtypes.bfloat16)))
    expected = {
        "n": r.size,
        "reference_norm": np.linalg.norm(r),
        "baseline_error": np.linalg.norm(b - r),
        "target_error": np.linalg.norm(t - r),
        "r_ratio": np.linalg.norm(t - r) / np.linalg.norm(b - r),
        "relative_l2": np.linalg.norm(t - r) / np.linalg.norm(r),
        "cosine": (t * r).sum() / np.linalg.norm(t) / np.linalg.norm(r),
        "max_abs_error": np.abs(t - r).max(),
        "mean_error": (t - r).mean(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-8), name
    quantiles = trace.query("SELECT probability, baseline, target FROM error_quantiles WHERE measurement = 0")
    p, low, high = (quantiles.column(i).to_numpy() for i in range(3))
    assert low == pytest.approx(np.quantile(b - r, p), rel=1e-8, abs=1e-15)
    assert high == pytest.approx(np.quantile(t - r, p), rel=1e-8, abs=1e-15)
    tokens = trace.query("SELECT position, target_sq FROM token_errors ORDER BY position")
    assert tokens.column("target_sq").to_numpy() == pytest.approx(((t - r) ** 2).sum(axis=(0, 2)), rel=1e-8)


def test_a_clean_port_passes(trace: Trace) -> None:
    row = judge(trace, R, B, T)
    assert (row["state"], row["verdict"]) == ("measured", "pass")
    assert row["r_low"] <= row["r_ratio"] <= row["r_high"]  # type: ignore[operator]


def test_a_site_with_three_times_the_error_fails(trace: Trace) -> None:
    assert judge(trace, R, B, noisy(R, 2, 3e-3))["verdict"] == "fail"


def test_a_few_unlucky_tokens_are_undecided(trace: Trace) -> None:
    target = T.copy()
    target[0, 3] = noisy(R, 2, 4e-3)[0, 3]  # one token of eleven
    row = judge(trace, R, B, target)
    assert row["r_ratio"] > 1.2  # type: ignore[operator]
    assert row["verdict"] == "undecided"


def test_equal_tensors_are_exact(trace: Trace) -> None:
    row = judge(trace, R, R, R)
    assert (row["state"], row["verdict"], row["r_ratio"]) == ("exact", "pass", None)


def test_an_exact_baseline_forgives_rounding_and_nothing_more(trace: Trace) -> None:
    rounded = R.astype(ml_dtypes.bfloat16)
    row = judge(trace, R, R, rounded)
    assert (row["state"], row["verdict"]) == ("baseline_exact", "pass")


def test_an_exact_baseline_exposes_a_wrong_lookup(trace: Trace) -> None:
    row = judge(trace, R, R, np.roll(R, 1, axis=1))
    assert (row["state"], row["verdict"], row["r_ratio"]) == ("baseline_exact", "fail", float("inf"))


def test_indices_that_differ_are_undecided_since_their_distance_means_nothing(trace: Trace) -> None:
    experts = np.tile(np.array([3, 1], np.int64), (1, POSITIONS, 1))
    swapped = experts.copy()
    swapped[0, 4] = [1, 3]
    row = judge(trace, experts, experts, swapped)
    assert (row["state"], row["verdict"]) == ("baseline_exact", "undecided")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_value_of_the_target_fails(trace: Trace, bad: float) -> None:
    target = T.copy()
    target[0, 2, 3] = bad
    row = judge(trace, R, B, target)
    assert (row["state"], row["verdict"], row["r_ratio"]) == ("nonfinite", "fail", None)


def test_a_nonfinite_value_of_the_baseline_leaves_the_site_undecided(trace: Trace) -> None:
    baseline = B.copy()
    baseline[0, 2, 3] = np.nan
    row = judge(trace, R, baseline, T)
    assert (row["state"], row["verdict"]) == ("nonfinite", "undecided")


def test_a_transposed_tensor_is_a_shape_mismatch_not_a_number(trace: Trace) -> None:
    row = judge(trace, R, B, T[:, :, :32])
    assert (row["state"], row["verdict"], row["n"]) == ("shape_mismatch", "fail", 0)


def test_positions_align_across_prefill_and_decode(trace: Trace) -> None:
    """The reference computes all positions at once, the target prefills seven and decodes four."""
    decode = [Tensor("mlp", T[:, p : p + 1], p, "decode", p - 6) for p in range(7, 11)]
    add_run(trace, "r", [Tensor("mlp", R)], tokens=TOKENS)
    add_run(trace, "b", [Tensor("mlp", B)], tokens=TOKENS)
    add_run(trace, "t", [Tensor("mlp", T[:, :7]), *decode], tokens=TOKENS)
    assert run_compare(trace).verdict == "pass"
    assert one(trace, "prefill")["n"] == 7 * WIDTH
    assert one(trace, "decode")["n"] == 4 * WIDTH
    expected = np.linalg.norm((T - R).astype(np.float64)[:, 7:]) / np.linalg.norm((B - R).astype(np.float64)[:, 7:])
    assert one(trace, "decode")["r_ratio"] == pytest.approx(expected, rel=1e-6)


def test_positions_align_across_growing_prefixes_and_chunks(trace: Trace) -> None:
    """A target without a cache repeats earlier positions: where it computed one first counts."""
    wrong = T + 1
    growing = [Tensor("mlp", np.concatenate([wrong[:, :7], T[:, 7:]], axis=1), 0, "decode", 1)]
    add_run(trace, "r", [Tensor("mlp", R[:, :4]), Tensor("mlp", R[:, 4:], 4)], tokens=TOKENS)
    add_run(trace, "b", [Tensor("mlp", B)], tokens=TOKENS)
    add_run(trace, "t", [Tensor("mlp", T[:, :7]), *growing], tokens=TOKENS)
    assert run_compare(trace).verdict == "pass"
    assert (one(trace, "prefill")["n"], one(trace, "decode")["n"]) == (7 * WIDTH, 4 * WIDTH)


def test_a_free_run_is_compared_up_to_the_first_other_token(trace: Trace) -> None:
    other = {0: [*range(8), 99, 98, 97, 96]}
    wrong = T.copy()
    wrong[:, 8:] += 1
    for run, values, tokens in (("r", R, TOKENS), ("b", B, TOKENS), ("t", wrong, other)):
        add_run(trace, run, [Tensor("mlp", values)], tokens=tokens, n_prompt=5)
    summary = run_compare(trace)
    assert one(trace)["n"] == 8 * WIDTH
    assert one(trace)["verdict"] == "pass"
    assert summary.verdict == "undecided"
    assert any("chose different tokens" in reason and "--teacher r" in reason for reason in summary.reasons)


def test_prompts_are_matched_by_their_tokens_not_their_index(trace: Trace) -> None:
    first, second = {0: [1, 2, 3], 1: [7, 8, 9]}, {0: [7, 8, 9], 1: [1, 2, 3]}
    values = [signal(seed, 2) for seed in (5, 6)]
    noise = [noisy(v, 7) for v in values]
    add_run(trace, "r", [Tensor("mlp", v, prompt=p) for p, v in enumerate(values)], tokens=first)
    add_run(trace, "b", [Tensor("mlp", v, prompt=p) for p, v in enumerate(noise)], tokens=first)
    add_run(trace, "t", [Tensor("mlp", v, prompt=1 - p) for p, v in enumerate(noise)], tokens=second)
    run_compare(trace)
    rows = trace.query("SELECT prompt, r_ratio FROM measurements ORDER BY prompt NULLS FIRST").to_pylist()
    assert [row["prompt"] for row in rows] == [None, 0, 1]
    assert [row["r_ratio"] for row in rows] == pytest.approx([1.0] * 3)


def test_a_hole_is_never_green(trace: Trace) -> None:
    add_run(trace, "r", [Tensor("mlp", R), Tensor("norm", R + 1, order=1)], tokens=TOKENS)
    add_run(trace, "b", [Tensor("mlp", B), Tensor("norm", B + 1, order=1)], tokens=TOKENS)
    add_run(trace, "t", [Tensor("mlp", T)], tokens=TOKENS)
    summary = run_compare(trace)
    assert (summary.verdict, summary.n_matched, summary.n_unmatched) == ("undecided", 1, 1)
    coverage = trace.query("SELECT site, status FROM coverage ORDER BY site").to_pylist()
    assert coverage == [{"site": "mlp", "status": "matched"}, {"site": "norm", "status": "unmatched"}]


def test_missing_positions_are_never_green(trace: Trace) -> None:
    for run, values in (("r", R), ("b", B), ("t", T[:, :7])):
        add_run(trace, run, [Tensor("mlp", values)], tokens=TOKENS)
    summary = run_compare(trace)
    assert summary.verdict == "undecided"
    assert "mlp at 7 of 11" in summary.reasons[0]


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({"observer_effect": {"checked": True, "identical": False, "max_abs_difference": 0.5}}, "capturing changed"),
        ({"checkpoint_fingerprint": "other"}, "different checkpoints"),
    ],
)
def test_doubts_about_a_run_are_never_green(trace: Trace, provenance: dict[str, object], reason: str) -> None:
    for run, values in (("r", R), ("b", B)):
        add_run(trace, run, [Tensor("mlp", values)], tokens=TOKENS, provenance={"checkpoint_fingerprint": "one"})
    add_run(trace, "t", [Tensor("mlp", T)], tokens=TOKENS, provenance=provenance)
    summary = run_compare(trace)
    assert summary.verdict == "undecided"
    assert any(reason in line for line in summary.reasons)


def test_an_interrupted_run_is_never_green(trace: Trace) -> None:
    for run, values, status in (("r", R, "complete"), ("b", B, "complete"), ("t", T, "repaired")):
        add_run(trace, run, [Tensor("mlp", values)], tokens=TOKENS, status=status)
    assert "incomplete" in run_compare(trace).reasons[0]


def test_tensors_without_positions_are_compared_whole(trace: Trace) -> None:
    for run, values in (("r", R), ("b", B), ("t", T)):
        add_run(trace, run, [Tensor("conv", values[0], None, "forward", step) for step in range(2)])
    summary = run_compare(trace)
    assert (summary.verdict, one(trace, "forward")["n"]) == ("pass", 2 * R.size)


def test_sizes_that_depend_on_the_data_are_compared_where_they_agree(trace: Trace) -> None:
    """An expert sees the tokens that are routed to it: four in the first step, one (with a position) in the second."""
    for run, values, second in (("r", R, 1), ("b", B, 1), ("t", T, 2)):
        tensors = [Tensor("expert", values[0, :4], None), Tensor("expert", values[:, 4:5], 7, "decode", 1)]
        tensors += [Tensor("expert", values[0, :second], None, "decode", 2)]
        add_run(trace, run, tensors, tokens=TOKENS)
    summary = run_compare(trace)
    assert summary.verdict == "undecided"
    assert "expert at 2 of 3" in summary.reasons[0]
    assert (one(trace, "prefill")["n"], one(trace, "decode")["n"]) == (4 * WIDTH, WIDTH)


def test_two_runs_without_a_baseline_are_held_against_a_tolerance(trace: Trace) -> None:
    add_run(trace, "r", [Tensor("mlp", R)], tokens=TOKENS)
    add_run(trace, "t", [Tensor("mlp", T)], tokens=TOKENS)
    loose = compare(trace, ComparisonRequest("r", "t", name="loose", thresholds=Thresholds(relative_l2=1e-2)))
    tight = compare(trace, ComparisonRequest("r", "t", name="tight", thresholds=Thresholds(relative_l2=1e-5)))
    assert (loose.verdict, tight.verdict) == ("pass", "fail")
    with pytest.raises(InputError, match="--tolerance"):
        compare(trace, ComparisonRequest("r", "t"))


def test_comparing_again_replaces_the_earlier_result(trace: Trace) -> None:
    judge(trace, R, B, T)
    tables = ("measurements", "coverage", "token_errors")
    counts = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    before = trace.query(counts).to_pylist()
    assert run_compare(trace).verdict == "pass"
    assert trace.query(counts).to_pylist() == before
    assert not list(trace.path.glob(".comparing-*"))


def test_an_unknown_run_names_those_there_are(trace: Trace) -> None:
    judge(trace, R, B, T)
    with pytest.raises(TraceNotFoundError, match="no run 'port'; its runs: r, b, t"):
        compare(trace, ComparisonRequest("r", "port", "b"))


def test_a_truncated_shard_is_one_clear_error_and_no_result(trace: Trace) -> None:
    judge(trace, R, B, T)
    shard = trace.shards("t")[0]
    trace = Trace.open(trace.path)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(IntegrityError, match="truncated"):
        run_compare(trace, name="second")
    assert trace.query("SELECT count(*) AS n FROM comparisons").to_pylist() == [{"n": 1}]
