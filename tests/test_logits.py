"""Judging the logits of a comparison: sites, positions, phases, criteria, verdicts and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy_runs import Array, Tensor, add_run
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.logits import LogitReport, judge_logits
from tensorsleuth.analyze.logits.criteria import Criterion
from tensorsleuth.analyze.sql_library import run_sql
from tensorsleuth.cli.app import main
from tensorsleuth.store import InputError, Trace, TraceNotFoundError

PROMPTS, PROMPT, GENERATED, WIDTH = 3, 9, 24, 120
LENGTH = PROMPT + GENERATED - 1  # the last token is not computed with
TOKENS = {p: [(7 * p + i) % 50 for i in range(LENGTH + 1)] for p in range(PROMPTS)}
N = PROMPTS * LENGTH


def signal(seed: int, width: int = WIDTH) -> Array:
    """Logits `[prompts, positions, vocabulary]` of a model that is mostly sure of itself."""
    return 3 * np.random.default_rng(seed).standard_normal((PROMPTS, LENGTH, width)).astype(np.float32)


def noisy(values: Array, seed: int, scale: float = 0.02) -> Array:
    noise = np.random.default_rng(seed).standard_normal(values.shape)
    return (values + scale * noise).astype(ml_dtypes.bfloat16)


R = signal(0)
B, T = noisy(R, 1), noisy(R, 2)


def tensors(values: Array, module: str = "lm_head", **options: Any) -> list[Tensor]:
    """A prefill over the prompt, and decode in steps of eight positions."""
    found = []
    for prompt, rows in enumerate(values):
        found.append(Tensor(module, rows[None, :PROMPT], prompt=prompt, dims="b s v", **options))
        found += [
            Tensor(module, rows[None, at : at + 8], at, "decode", at, prompt, dims="b s v", **options)
            for at in range(PROMPT, len(rows), 8)
        ]
    return found


def add(trace: Trace, run: str, recorded: Sequence[Tensor], role: str = "target", **options: Any) -> None:
    dtype = "float32" if role == "reference" else "bfloat16"
    options = {"tokens": TOKENS, "n_prompt": PROMPT, "dtype": dtype} | options
    add_run(trace, run, recorded, role=role, **options)


def references(trace: Trace) -> None:
    add(trace, "r", tensors(R), "reference")
    add(trace, "b", tensors(B), "baseline")


def judge(trace: Trace, target: Array = T, **options: Any) -> LogitReport:
    references(trace)
    add(trace, "t", tensors(target))
    compare(trace, ComparisonRequest("r", "t", "b"))
    return judge_logits(trace, "t", **options)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, LogitReport]:
    """A clean port, judged; for tests that only look."""
    trace = Trace.create(tmp_path_factory.mktemp("clean") / "trace")
    return trace, judge(trace)


def criterion(report: LogitReport, name: str, scope: str = "all") -> Criterion:
    return next(item for item in report.criteria if (item.name, item.scope) == (name, scope))


def failing(report: LogitReport, scope: str = "all") -> set[str]:
    return {item.name for item in report.criteria if item.scope == scope and item.verdict == "fail"}


def test_a_clean_port_passes_and_says_what_was_compared(clean: tuple[Trace, LogitReport]) -> None:
    trace, report = clean
    assert (report.verdict, report.reasons) == ("pass", ())
    assert (report.reference_site, report.dtype, report.vocabulary) == ("lm_head", "bfloat16", WIDTH)
    rows = trace.query("SELECT count(*) AS n, count(DISTINCT (prompt, position)) AS places FROM logits").to_pylist()
    assert rows == [{"n": N, "places": N}]
    assert {item.scope for item in report.criteria} == {"all", "prefill", "decode"}
    assert sum(item.compared for item in report.positions) == N


def test_the_published_criteria_are_each_evaluated_with_value_and_limit(clean: tuple[Trace, LogitReport]) -> None:
    trace, report = clean
    found = trace.query("FROM logits ORDER BY prompt, position")
    expected = {
        "r_p95": (np.quantile(found["r_ratio"].to_numpy(), 0.95), "<", 1.2),
        "cosine_p5": (np.quantile(found["cosine"].to_numpy(), 0.05), ">=", 0.95),
        "kl_p95": (np.quantile(found["kl"].to_numpy(), 0.95), "<=", 0.1),
        "top1_rate": (np.mean(found["top1"].to_pylist()), ">", 0.5),
    }
    published = [item.name for item in report.criteria if item.published and item.scope == "all"]
    assert published == [*expected, "greedy_match"]
    for name, (value, sense, limit) in expected.items():
        item = criterion(report, name)
        assert (item.value, item.sense, item.limit) == (pytest.approx(value, rel=1e-12), sense, limit)
    stored = trace.query("SELECT criterion, value, threshold FROM logit_criteria WHERE scope = 'all' AND published")
    assert stored["criterion"].to_pylist() == published


def test_an_identical_model_is_perfect(trace: Trace) -> None:
    report = judge(trace, R)
    assert report.verdict == report.published == "pass"
    row = trace.query("SELECT max(kl) AS kl, min(cosine) AS cosine, bool_and(top1) AS same FROM logits").to_pylist()[0]
    assert row == {"kl": 0.0, "cosine": 1.0, "same": True}
    assert criterion(report, "flips").value == 0.0


def test_permuted_logits_fail(trace: Trace) -> None:
    permuted = np.random.default_rng(5).permuted(T, axis=2)
    report = judge(trace, permuted)
    assert (report.verdict, report.published) == ("fail", "fail")
    assert {"r_p95", "cosine_p5", "kl_p95", "top1_rate", "r_max", "kl_max", "flips"} <= failing(report)


def test_four_bad_positions_among_96_are_seen_though_every_percentile_passes(trace: Trace) -> None:
    target = T.copy()
    places = [(0, 3), (1, 12), (1, 30), (2, 20)]
    for prompt, position in places:
        target[prompt, position] = np.roll(target[prompt, position], 1)
    report = judge(trace, target)
    assert N == 96
    assert {"r_p95", "cosine_p5", "kl_p95", "top1_rate"}.isdisjoint(failing(report))
    assert {"r_max", "kl_max", "cosine_min", "flip_sigma_max"} <= failing(report)
    assert report.verdict == "fail"
    bad = trace.query("SELECT prompt, position FROM logits WHERE verdict = 'fail' ORDER BY ALL").to_pylist()
    assert [(row["prompt"], row["position"]) for row in bad] == places


def test_a_wrong_decode_is_told_from_a_wrong_prefill(trace: Trace) -> None:
    target = T.copy()
    target[:, PROMPT:] = noisy(R, 3, 0.2)[:, PROMPT:]
    report = judge(trace, target)
    assert failing(report, "prefill") == set()
    assert {"r_pooled", "r_p95"} <= failing(report, "decode")


def test_a_single_logit_that_is_wrong_shows_in_the_flips(trace: Trace) -> None:
    """Token 5's row of the head is off: too little for KL at most positions, but it wins where it should not."""
    target = np.float32(T)
    target[:, :, 5] += 4.0
    report = judge(trace, target.astype(ml_dtypes.bfloat16))
    assert {"flips", "flip_sigma_max"} <= failing(report)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_fail_and_stay_visible(trace: Trace, bad: float) -> None:
    target = T.copy()
    target[1, 4, 7] = bad
    report = judge(trace, target)
    assert failing(report) == {"nonfinite"}
    row = trace.query("FROM logits WHERE state = 'nonfinite'").to_pylist()
    assert [(r["prompt"], r["position"], r["kl"], r["verdict"]) for r in row] == [(1, 4, None, "fail")]


def test_a_baseline_that_is_not_finite_leaves_it_undecided(trace: Trace) -> None:
    baseline = B.copy()
    baseline[0, 0, 0] = np.nan
    add(trace, "r", tensors(R), "reference")
    add(trace, "b", tensors(baseline), "baseline")
    add(trace, "t", tensors(T))
    compare(trace, ComparisonRequest("r", "t", "b"))
    report = judge_logits(trace, "t")
    assert report.verdict == "undecided"
    assert criterion(report, "nonfinite").verdict == "undecided"


def test_a_prefill_that_computes_its_last_position_only_is_said_and_fine(trace: Trace) -> None:
    references(trace)
    kept = [item for item in tensors(T) if item.phase == "decode"]
    kept += [Tensor("lm_head", T[p, None, PROMPT - 1 : PROMPT], PROMPT - 1, prompt=p, dims="b s v") for p in range(3)]
    add(trace, "t", kept)
    compare(trace, ComparisonRequest("r", "t", "b"))
    report = judge_logits(trace, "t")
    assert report.verdict == "pass"
    assert [(p.compared, p.reference_only, p.decode_lacking) for p in report.positions] == [(24, 8, 0)] * 3


def test_decode_positions_without_logits_leave_it_undecided(trace: Trace) -> None:
    references(trace)
    add(trace, "t", [item for item in tensors(T) if item.start != PROMPT + 16])
    compare(trace, ComparisonRequest("r", "t", "b"))
    report = judge_logits(trace, "t")
    assert report.verdict == "undecided"
    assert "21 positions after the prompt" in " ".join(report.reasons)


def test_one_position_is_enough(trace: Trace) -> None:
    for run, values, role in (("r", R, "reference"), ("b", B, "baseline"), ("t", T, "target")):
        only = [Tensor("lm_head", values[0, None, :1], prompt=0, dims="b s v")]
        add(trace, run, only, role, tokens={0: [3]}, n_prompt=1)
    compare(trace, ComparisonRequest("r", "t", "b"))
    assert judge_logits(trace, "t").verdict == "pass"
    assert trace.query("SELECT count(*) AS n FROM logits").to_pylist() == [{"n": 1}]


def test_phases_of_few_positions_are_printed_side_by_side(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    for run, values, role in (("r", R, "reference"), ("b", B, "baseline"), ("t", T, "target")):
        recorded = [Tensor("lm_head", values[0, None, :1], prompt=0, dims="b s v")]
        recorded += [Tensor("lm_head", values[0, None, 1:5], 1, "decode", 1, 0, dims="b s v")]
        add(trace, run, recorded, role, tokens={0: TOKENS[0][:6]}, n_prompt=1)
    compare(trace, ComparisonRequest("r", "t", "b"))
    assert main(["logits", str(trace.path), "t"]) == 0
    assert "by phase" in capsys.readouterr().out


def test_a_head_split_over_ranks_is_joined(trace: Trace) -> None:
    references(trace)
    half = WIDTH // 2
    parts = [
        Tensor("lm_head", item.array[..., rank * half : (rank + 1) * half], item.start, item.phase, item.step,
               item.prompt, dims="b s v[tp]", rank=rank)
        for rank in range(2) for item in tensors(T)
    ]  # fmt: skip
    add(trace, "t", parts, tp=2)
    compare(trace, ComparisonRequest("r", "t", "b"))
    split = judge_logits(trace, "t")
    add(trace, "whole", tensors(T))
    compare(trace, ComparisonRequest("r", "whole", "b"))
    whole = judge_logits(trace, "whole")
    assert [c.value for c in split.criteria] == [c.value for c in whole.criteria]


@pytest.mark.parametrize(("padding", "verdict"), [(-100.0, "pass"), (100.0, "undecided")])
def test_a_padded_vocabulary_is_compared_without_its_padding(trace: Trace, padding: float, verdict: str) -> None:
    padded = np.concatenate([T, np.full((PROMPTS, LENGTH, 8), padding, T.dtype)], axis=2)
    report = judge(trace, padded)
    assert report.n_padded == 8
    assert criterion(report, "padding_wins").value == (0.0 if padding < 0 else N)
    assert report.verdict == verdict
    assert criterion(report, "flips").verdict == "pass"


def test_where_the_root_hands_out_padding_that_wins_it_fails(trace: Trace) -> None:
    add(trace, "r", tensors(R, ""), "reference")
    add(trace, "b", tensors(B, ""), "baseline")
    add(trace, "t", tensors(np.concatenate([T, np.full((PROMPTS, LENGTH, 8), 100.0, T.dtype)], axis=2), ""))
    compare(trace, ComparisonRequest("r", "t", "b"))
    assert failing(judge_logits(trace, "t")) == {"padding_wins"}


def test_two_runs_without_a_baseline_are_held_against_absolute_limits(trace: Trace) -> None:
    from tensorsleuth.analyze.verdict import Thresholds

    references(trace)
    compare(trace, ComparisonRequest("r", "b", thresholds=Thresholds(relative_l2=0.05)))
    report = judge_logits(trace, "b")
    assert report.verdict == "pass"
    assert {"relative_l2", "kl_max", "top1_rate"} <= {item.name for item in report.criteria}
    assert not {"r_p95", "r_pooled", "flips"} & {item.name for item in report.criteria}


# Sites


def test_the_root_counts_before_the_head(trace: Trace) -> None:
    capped = [30 * np.tanh(np.float32(values) / 30) for values in (R, B, T)]
    for run, values, cap, role in zip("rbt", (R, B, T), capped, ("reference", "baseline", "target"), strict=True):
        add(trace, run, tensors(values) + tensors(cap, "", slot="logits"), role)
    compare(trace, ComparisonRequest("r", "t", "b"))
    assert judge_logits(trace, "t").reference_site == "(root)[logits]"
    assert judge_logits(trace, "t", site="lm_head").reference_site == "lm_head"


def test_several_heads_need_a_name(trace: Trace) -> None:
    others = [noisy(signal(9), 10 + i) for i in range(3)]
    for run, values, other, role in zip("rbt", (R, B, T), others, ("reference", "baseline", "target"), strict=True):
        add(trace, run, tensors(values, "main.lm_head") + tensors(other, "draft.lm_head"), role)
    compare(trace, ComparisonRequest("r", "t", "b"))
    with pytest.raises(InputError, match=r"draft\.lm_head, main\.lm_head; name one with --site"):
        judge_logits(trace, "t")
    assert judge_logits(trace, "t", site="main.lm_head").verdict == "pass"


def test_what_cannot_be_judged_is_one_clear_line(trace: Trace) -> None:
    for run, values, role in (("r", R, "reference"), ("b", B, "baseline"), ("t", T, "target")):
        add(trace, run, tensors(values, "mlp"), role)
    compare(trace, ComparisonRequest("r", "t", "b"))
    with pytest.raises(InputError, match="--site"):
        judge_logits(trace, "t")
    with pytest.raises(InputError, match="pairs no site 'lm_head'"):
        judge_logits(trace, "t", site="lm_head")
    with pytest.raises(TraceNotFoundError, match="it has: t"):
        judge_logits(trace, "nothing")


def test_a_part_of_the_vocabulary_is_refused(trace: Trace) -> None:
    references(trace)
    add(trace, "t", tensors(T[..., : WIDTH // 2]))
    compare(trace, ComparisonRequest("r", "t", "b"))
    with pytest.raises(InputError, match=r"part of the vocabulary|pairs no site"):
        judge_logits(trace, "t")


# Free runs


def free(change: int | None = None, keep: int | None = None) -> dict[int, list[int]]:
    """Tokens of a free run: another one from position `change` on in prompt 0, prompt 1 cut to `keep` tokens."""
    tokens = {prompt: list(ids) for prompt, ids in TOKENS.items()}
    if change is not None:
        tokens[0][change:] = [99] * (len(tokens[0]) - change)
    if keep is not None:
        tokens[1] = tokens[1][:keep]
    return tokens


def test_a_free_run_is_held_against_the_reference_token_by_token(trace: Trace) -> None:
    references(trace)
    add(trace, "t", tensors(T))
    compare(trace, ComparisonRequest("r", "t", "b"))
    add(trace, "free", [], tokens=free(change=PROMPT + 6, keep=PROMPT + 20))
    report = judge_logits(trace, "t", greedy="free")
    first, second, third = report.greedy
    assert (first.n_match, first.first_difference, first.n_missing) == (6, PROMPT + 6, 0)
    assert (second.n_match, second.first_difference, second.n_missing) == (20, PROMPT + 20, 4)
    assert (third.n_match, third.first_difference, third.n_beyond) == (GENERATED, None, 0)
    item = criterion(report, "greedy_match")
    assert (item.value, item.limit) == ((6 + 20 + 24) / 72, 0.3)
    assert "4 missing tokens" in item.note


def test_a_free_run_that_parts_early_is_undecided_where_the_logits_agree(trace: Trace) -> None:
    judge(trace)
    add(trace, "free", [], tokens={p: [*ids[: PROMPT + 1], *[99] * (GENERATED - 1)] for p, ids in TOKENS.items()})
    report = judge_logits(trace, "t", greedy="free")
    assert criterion(report, "greedy_match").verdict == report.verdict == "undecided"


def test_the_target_itself_counts_when_it_ran_free(clean: tuple[Trace, LogitReport]) -> None:
    _, report = clean
    assert (report.greedy_run, criterion(report, "greedy_match").value) == ("t", 1.0)


# The command


def test_the_command_prints_the_criteria_and_exits_by_the_verdict(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(trace)
    assert main(["logits", str(trace.path), "t"]) == 0
    text = capsys.readouterr().out
    for expected in ("95th percentile", "< 1.2", ">= 0.95", "> 0.5", "verdict: pass", "prefill", "by prompt"):
        assert expected in text
    assert main(["logits", str(trace.path), "t", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], len(found["prompts"])) == ("pass", PROMPTS)
    add(trace, "bad", tensors(noisy(R, 4, 0.3)))
    compare(trace, ComparisonRequest("r", "bad", "b"))
    assert main(["logits", str(trace.path), "bad"]) == 1
    assert main(["logits", str(trace.path), "nothing"]) == 2
    assert "has no comparison" in capsys.readouterr().err


def test_views_answer_from_the_stored_rows(trace: Trace) -> None:
    target = T.copy()
    target[0, 20] = np.roll(target[0, 20], 1)
    judge(trace, target)
    prompts = run_sql(trace, "SELECT prompt, n_fail, first_fail FROM logit_profile ORDER BY prompt").to_pylist()
    assert prompts[0] == {"prompt": 0, "n_fail": 1, "first_fail": 20}
    phases = run_sql(trace, "SELECT phase, n_fail FROM logit_phases ORDER BY phase_order(phase)").to_pylist()
    assert phases == [{"phase": "prefill", "n_fail": 0}, {"phase": "decode", "n_fail": 1}]
    worst = run_sql(trace, "FROM logit_flips ORDER BY flip_sigma DESC LIMIT 1").to_pylist()[0]
    assert (worst["prompt"], worst["position"]) == (0, 20)


def test_judging_again_replaces_and_forgetting_forgets(trace: Trace) -> None:
    judge(trace)
    judge_logits(trace, "t")
    assert trace.query("SELECT count(*) AS n FROM logits").to_pylist() == [{"n": N}]
    compare(trace, ComparisonRequest("r", "t", "b"))
    for table in ("logits", "logit_criteria"):
        assert trace.query(f"SELECT count(*) AS n FROM {table}").to_pylist() == [{"n": 0}]
