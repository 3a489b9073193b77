"""Comparing runs: map the sites, align the tensors, measure, judge, and keep it all in the catalog."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..store import catalog
from ..store.errors import InputError
from ..store.progress import Progress, no_progress
from ..store.trace import Trace
from .align import AlignedSite, PromptPair, Selection, align, match_prompts
from .calibration.judging import Judging
from .calibration.learned import Calibration
from .calibration.replicates import check_replicates
from .coverage import CoverageReport, Covered, doubts_about_coverage, store_coverage
from .doubts import doubts_about
from .loading import load_sites
from .masks import accounted, agree, masks_of
from .matching import map_runs
from .pairs import Gap, Pair, SiteMapping
from .rank_doubts import doubts_about_ranks
from .ranks import Stored
from .results import ResultWriter
from .routed_rows import NOTHING_SHARED, SharedTokens, without_unsent
from .sites import Site, SiteInfo, sites_of
from .sql_library import install
from .verdict import Thresholds, overall_verdict

#: Index rows of the reference that are held at once (its sites are loaded in chunks of about this size).
_CHUNK_TENSORS = 4096


@dataclass(frozen=True)
class ComparisonRequest:
    """What to compare.

    Attributes:
        reference: run that is the ground truth (FP32).
        target: run under test.
        baseline: the reference's model in the target's precision; None compares two runs by relative L2.
        name: name of the comparison; the target's name by default.
        thresholds: limits for the verdicts.
        include: globs over reference module paths to compare; all by default.
        exclude: globs over reference module paths to leave out.
        mapping: a component_mapping.json that overrides the automatic mapping.
        replicates: runs that compute what the baseline computes with other rounding: they show how clean runs scatter.
        calibration: limits learnt from known-good ports, already part of `thresholds`; its null serves when there are
            no replicates.
    """

    reference: str
    target: str
    baseline: str | None = None
    name: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mapping: Path | None = None
    replicates: tuple[str, ...] = ()
    calibration: Calibration | None = None

    @property
    def comparison(self) -> str:
        """Name under which results are stored."""
        return self.name or self.target

    def rests_on(self) -> dict[str, Any]:
        """What the verdicts rest on, JSON-ready: limits, and the null behind the p-values."""
        null = "replicates" if self.replicates else "calibration" if self.calibration else "tokens"
        return {
            **self.thresholds.as_dict(),
            "replicates": list(self.replicates),
            "null": null if self.baseline is not None else None,
        }


@dataclass(frozen=True)
class ComparisonSummary:
    """Outcome of a comparison; everything else is in the catalog.

    `reasons` speak against it; `notes` say what its verdicts rest on.
    """

    comparison: str
    verdict: str
    reasons: tuple[str, ...]
    n_matched: int
    n_unmatched: int
    n_skipped: int
    n_measurements: int
    notes: tuple[str, ...] = ()


def compare(trace: Trace, request: ComparisonRequest, *, progress: Progress = no_progress) -> ComparisonSummary:
    """Compare runs of a trace site by site; results replace an earlier comparison of the same name.

    Tensors are mapped from the shards and measured piece by piece, so memory does not grow with the trace.

    Raises:
        TraceNotFoundError: a run does not exist.
        InputError: the request contradicts itself, or its mapping file does not fit the runs.
        IntegrityError: a shard is damaged.
    """
    _check(request)
    runs = (request.reference, request.baseline, request.target)
    for run in runs:
        if run is not None:
            trace.manifest(run)
    check_replicates(trace, request.baseline, request.replicates)
    prompts = match_prompts(trace, *runs)
    mapped = map_runs(
        trace, runs, prompts, include=request.include, exclude=request.exclude, file=request.mapping, progress=progress
    )
    mapping = mapped.mapping
    if request.baseline is not None:
        mapping = without_unsent(trace, runs, _with_baseline(mapping, sites_of(trace, request.baseline)))
    chunks = _chunks(mapping.pairs, {info.site: info.n_tensors for info in mapped.reference})
    masks = masks_of(trace, request.reference)
    shared = SharedTokens(trace, runs, prompts)
    covered: list[Covered] = []
    elsewhere: list[Gap] = []
    judging = Judging(trace, runs, request.thresholds, request.replicates, request.calibration, chunks)
    with ResultWriter(trace.path, request.comparison) as results:
        for number, (pair, aligned, stored) in enumerate(_aligned_pairs(trace, request, chunks, prompts)):
            progress(pair.reference.name, number, len(mapping.pairs))
            if pair.reference in masks and not agree(aligned):
                continue
            expected, left_out = shared.of(pair, stored[-1]) or (_n_positions(stored[0]), 0)
            if left_out and not expected:
                elsewhere.append(Gap(pair.reference, "skipped", NOTHING_SHARED))
                continue
            results.add(judging.measure(pair, number, aligned))
            trace.release_pages()
            compared = sum(site.n_positions for phase in aligned.values() for site in phase.values())
            covered.append(Covered(pair, tuple(aligned), compared, expected, left_out))
        mapping = replace(mapping, gaps=(*mapping.gaps, *dict.fromkeys(elsewhere)))
        mapping = accounted(mapping, masks, {item.pair.reference for item in covered})
        report = CoverageReport.of(covered, mapping, {info.site: info.exec_order for info in mapped.reference})
        doubts = doubts_about(trace, request.reference, request.baseline, request.target, prompts)
        doubts += doubts_about_ranks(trace, request.target, [pair.target for pair in mapping.pairs])
        doubts += doubts_about_coverage(report)
        outcomes = judging.outcomes()
        verdict, reasons = overall_verdict(outcomes.overall, len(report.unmatched), doubts)
        summary = ComparisonSummary(
            request.comparison,
            verdict,
            tuple(reasons),
            report.n_matched,
            len(report.unmatched),
            len(report.gaps) - len(report.unmatched),
            results.n_measurements,
            outcomes.notes,
        )
        with catalog.writing(trace.catalog_path) as connection:
            _store(connection, request, summary, report)
            results.commit(connection, outcomes)
            install(connection, temporary=False)
    return summary


def _check(request: ComparisonRequest) -> None:
    runs = [run for run in (request.reference, request.baseline, request.target) if run is not None]
    if len(set(runs)) != len(runs):
        raise InputError(f"reference, baseline and target must be different runs, not {', '.join(runs)}")
    if shared := set(runs) & set(request.replicates):
        raise InputError(f"{', '.join(shared)} cannot be its own replicate; capture one with --replicate")
    if request.baseline is None and request.thresholds.relative_l2 is None:
        raise InputError(
            "without a baseline there is no R; name one, or give a limit for relative L2 (--tolerance 1e-5)"
        )
    if request.baseline is not None and request.thresholds.relative_l2 is not None:
        raise InputError("a limit for relative L2 is for comparisons without a baseline; leave one of the two out")


def _with_baseline(mapping: SiteMapping, baseline: Sequence[SiteInfo]) -> SiteMapping:
    """Turn pairs whose reference site the baseline lacks into holes."""
    known = {info.site for info in baseline if not info.n_statistics_only}
    missing = [pair for pair in mapping.pairs if pair.reference not in known]
    holes = [Gap(pair.reference, "unmatched", "the baseline did not record this site's values") for pair in missing]
    kept = tuple(pair for pair in mapping.pairs if pair.reference in known)
    return replace(mapping, pairs=kept, gaps=(*mapping.gaps, *dict.fromkeys(holes)))


def _chunks(pairs: Sequence[Pair], n_tensors: Mapping[Site, int]) -> list[list[Pair]]:
    """Split the pairs so that each part has about `_CHUNK_TENSORS` tensors in the reference."""
    chunks: list[list[Pair]] = []
    held = _CHUNK_TENSORS
    for pair in pairs:
        if held >= _CHUNK_TENSORS:
            chunks.append([])
            held = 0
        chunks[-1].append(pair)
        held += n_tensors[pair.reference]
    return chunks


def _aligned_pairs(
    trace: Trace, request: ComparisonRequest, chunks: Sequence[Sequence[Pair]], prompts: Sequence[PromptPair]
) -> Iterator[tuple[Pair, Mapping[str, Mapping[int, AlignedSite]], tuple[list[Stored], list[Stored]]]]:
    """Every pair with what can be compared, and the tensors of the reference and of the target."""
    for pairs in chunks:
        wanted = [(request.reference, pair.reference) for pair in pairs]
        wanted += [(request.target, pair.target) for pair in pairs]
        if request.baseline is not None:
            wanted += [(request.baseline, pair.reference) for pair in pairs]
        stored = load_sites(trace, dict.fromkeys(wanted))
        for pair in pairs:
            reference = stored.get((request.reference, pair.reference), [])
            baseline = stored.get((request.baseline, pair.reference), []) if request.baseline else None
            target = stored.get((request.target, pair.target), [])
            selection = Selection(pair.reference_columns, pair.columns, pair.expert)
            aligned = align(trace, (reference, baseline, target), prompts, selection)
            yield pair, aligned, (reference, target)


def _n_positions(tensors: Sequence[Stored]) -> int:
    positions = set()
    for stored in tensors:
        if stored.position_start is None:
            positions.add((stored.prompt, stored.phase, stored.step))
        else:
            positions.update((stored.prompt, "", position) for position in stored.positions)
    return len(positions)


def _store(connection: Any, request: ComparisonRequest, summary: ComparisonSummary, report: CoverageReport) -> None:
    """Replace the comparison's rows in the catalog, except for the measurements themselves."""
    name = request.comparison
    catalog.forget_comparison(connection, name)
    catalog.insert(
        connection,
        "comparisons",
        {
            "comparison": [name],
            "reference": [request.reference],
            "baseline": [request.baseline],
            "target": [request.target],
            "mapping": [name],
            "thresholds": [json.dumps(request.rests_on())],
            "created_at": [datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)],
            "verdict": [summary.verdict],
            "reasons": [list(summary.reasons)],
            "n_matched": [summary.n_matched],
            "n_unmatched": [summary.n_unmatched],
            "n_skipped": [summary.n_skipped],
        },
    )
    catalog.insert(
        connection,
        "mappings",
        {
            "mapping": [name],
            "reference": [request.reference],
            "target": [request.target],
            "origin": [report.mapping.origin],
        },
    )
    store_coverage(connection, name, report)
