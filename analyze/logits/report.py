"""Judging the logits of a comparison: measure every position, hold them against the criteria, keep the outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ...store import catalog
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..doubts import doubts_about
from ..sql_library import install
from ..verdict import FAIL, PASS, UNDECIDED
from .criteria import Criterion, Positions, evaluate, scopes
from .greedy import GreedyMatch, greedy_matches, runs_free
from .source import AlignedLogits, ComparedRuns, SharedPositions, aligned_logits, runs_of
from .table import measured_rows

#: Smallest share of tokens that a free run has in common with the reference's: the Equivalence skill's smoke test.
ALIVE = 0.3


@dataclass(frozen=True)
class LogitReport:
    """Outcome for the logits of a comparison; the rows are in the catalog.

    Attributes:
        comparison: its name.
        reference_site, target_site: where the logits came from.
        dtype: dtype that the target computes logits in; margins count its units in the last place.
        vocabulary, n_padded: tokens compared, and the target's columns beyond them.
        verdict: pass, fail or undecided.
        published: verdict of the Equivalence skill's criteria alone, to the letter; undecided if one is undefined.
        reasons: why the verdict is not a plain pass.
        criteria: each, in every scope.
        positions: what was compared, per prompt.
        greedy: token matches of a free run, empty without one.
        greedy_run: that run.
    """

    comparison: str
    reference_site: str
    target_site: str
    dtype: str
    vocabulary: int
    n_padded: int
    verdict: str
    published: str
    reasons: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    positions: tuple[SharedPositions, ...]
    greedy: tuple[GreedyMatch, ...]
    greedy_run: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def judge_logits(
    trace: Trace,
    comparison: str,
    *,
    site: str | None = None,
    greedy: str | None = None,
    progress: Progress = no_progress,
) -> LogitReport:
    """Judge the logits of a stored comparison, from the shards alone; results replace earlier ones.

    Args:
        trace: the trace.
        comparison: name of the comparison.
        site: site that holds the logits, of the reference or the target; found by itself if not given.
        greedy: a free run whose tokens are held against the reference's; the target itself if it ran free.
        progress: told about prompts on the way.

    Raises:
        TraceNotFoundError: no such comparison or run.
        InputError: no site of logits, several, or one that cannot be compared.
        IntegrityError: a shard is damaged.
    """
    runs = runs_of(trace, comparison)
    logits = aligned_logits(trace, runs, site)
    if greedy is None and runs_free(trace, runs.target) and runs_free(trace, runs.reference):
        greedy = runs.target
    matches = greedy_matches(trace, runs.reference, greedy) if greedy is not None else []
    rows = measured_rows(trace, runs, logits, progress)
    found = list(_criteria(rows, runs, logits))
    found += _about_greedy(matches, found)
    doubts = doubts_about(trace, runs.reference, runs.baseline, runs.target, logits.prompts)
    doubts += _about_positions(logits, runs)
    verdict, reasons = _overall(found, doubts)
    report = LogitReport(
        comparison, logits.sites.reference.name, logits.sites.target.name, logits.dtype, logits.sites.vocabulary,
        logits.sites.n_padded, verdict, _to_the_letter(found), tuple(reasons), tuple(found), logits.positions,
        tuple(matches), greedy,
    )  # fmt: skip
    _store(trace, report, rows)
    return report


def _criteria(rows: pa.Table, runs: ComparedRuns, logits: AlignedLogits) -> Iterator[Criterion]:
    if not rows.num_rows:
        return
    for scope, part in scopes(rows, list(logits.phases)):
        yield from evaluate(Positions(scope, part, runs.baseline is not None, logits.dtype), runs.thresholds)
    if logits.sites.n_padded:
        wins = float(np.sum(rows["padding_wins"].to_numpy(zero_copy_only=False) == True))  # noqa: E712 (may be None)
        verdict = PASS if not wins else FAIL if logits.sites.is_root else UNDECIDED
        note = "a later mask may hide them" if wins and verdict == UNDECIDED else ""
        meaning = f"positions where one of {logits.sites.n_padded} padded columns is the largest"
        yield Criterion("all", "padding_wins", meaning, False, wins, "<=", 0.0, None, verdict, note)


def _about_greedy(matches: Sequence[GreedyMatch], found: Sequence[Criterion]) -> list[Criterion]:
    """The smoke test: a low match of free runs is a failure, or bad luck at narrow margins if all else passes."""
    if not matches:
        return []
    rate = sum(match.n_match for match in matches) / sum(match.n_tokens for match in matches)
    ended = [match for match in matches if match.n_missing]
    note = ""
    if ended:
        missing = sum(match.n_missing for match in ended)
        note = f"{len(ended)} prompts ended early; {missing} missing tokens count as different"
    verdict = PASS if rate > ALIVE else FAIL
    if verdict == FAIL and found and all(item.verdict == PASS for item in found):
        verdict, note = UNDECIDED, "forced to the same tokens, it agrees: after a close call, free runs part"
    meaning = "share of the reference's tokens that a free run also chose"
    return [Criterion("all", "greedy_match", meaning, True, rate, ">", ALIVE, None, verdict, note)]


def _about_positions(logits: AlignedLogits, runs: ComparedRuns) -> list[str]:
    lacking = sum(item.decode_lacking for item in logits.positions)
    if not lacking:
        return []
    return [f"{lacking} positions after the prompt have logits in {runs.reference!r} but not in the others"]


def _overall(found: Sequence[Criterion], doubts: Sequence[str]) -> tuple[str, list[str]]:
    failed = [item for item in found if item.verdict == FAIL]
    reasons = []
    for verdict, verb in ((FAIL, "fails"), (UNDECIDED, "is undecided")):
        by_scope: dict[str, list[str]] = {}
        for item in found:
            if item.verdict == verdict:
                by_scope.setdefault(item.scope, []).append(item.name)
        reasons += [f"{scope} {verb}: {', '.join(names)}" for scope, names in by_scope.items()]
    reasons += doubts
    if not found:
        reasons.append("no position has logits in all runs")
    if failed:
        return FAIL, reasons
    return (UNDECIDED if reasons else PASS), reasons


def _to_the_letter(found: Sequence[Criterion]) -> str:
    """What the published criteria say over all positions, without any allowance."""
    held = [item.holds for item in found if item.published and item.scope == "all" and item.name != "greedy_match"]
    if any(hold is False for hold in held):
        return FAIL
    return PASS if held and None not in held else UNDECIDED


def _store(trace: Trace, report: LogitReport, rows: pa.Table) -> None:
    """Replace the comparison's rows in the catalog."""
    criteria = [asdict(item) | {"holds": item.holds} for item in report.criteria]
    with catalog.writing(trace.catalog_path) as connection:
        for table in ("logits", "logit_criteria"):
            connection.execute(f"DELETE FROM {table} WHERE comparison = ?", [report.comparison])  # noqa: S608
        catalog.insert(connection, "logits", rows)
        if criteria:
            columns = {"criterion" if key == "name" else key: [item[key] for item in criteria] for key in criteria[0]}
            columns["threshold"] = columns.pop("limit")
            catalog.insert(connection, "logit_criteria", columns | {"comparison": [report.comparison] * len(criteria)})
        install(connection, temporary=False)
