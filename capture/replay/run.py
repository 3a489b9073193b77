"""The replay of a comparison: two runs of the reference's modules on the target's values, compared with the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...analyze.compare import ComparisonRequest, compare
from ...analyze.localization.replays import SUFFIX
from ...analyze.sites import Site
from ...analyze.sql_library import run_sql
from ...store.errors import InputError
from ...store.manifest import RunManifest
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..hf import ModelSource, load_model, parse_dtype, quiet_transformers
from .compared import Compared, read_comparison
from .injecting import Injecting, injecting_modules
from .ledger import LeftOut, enter_ledger, left_out
from .passes import prompts_of, replay_run
from .random_inputs import RandomInputs
from .recorder import Inputs, Replaying
from .reductions import parallel_linears, rounded_like
from .self_check import check_reference, find_model
from .values import MappedValues, ValueSource

#: Suffix of the comparison that a component test on random inputs makes.
RANDOM_SUFFIX = ".random"


@dataclass(frozen=True)
class ReplayRequest:
    """What to replay.

    Attributes:
        comparison: the comparison whose target gives the inputs.
        model: folder of the reference's model; where the reference was captured from by default.
        modules: globs over the reference's module paths; all by default.
        tp: ranks over which the target sums row-parallel projections; the target's own by default.
        mapping: the component_mapping.json that the comparison used, if it used one.
        random: seed of random inputs in place of the target's; the target's modules are run on them too.
    """

    comparison: str
    model: Path | None = None
    modules: tuple[str, ...] = ()
    tp: int | None = None
    mapping: Path | None = None
    random: int | None = None


@dataclass(frozen=True)
class ReplaySummary:
    """Outcome of a replay; everything else is in the catalog under the comparison `<C>.replay` or `<C>.random`.

    Attributes:
        comparison: its name.
        replay_of: the comparison that was replayed.
        reference, baseline, target: the runs that it compared; the first two are replays, with random inputs all are.
        verdict: `fail` if a module adds error of its own.
        reasons: why it is not `pass`.
        injecting: modules that add error of their own, the innermost failing ones, in dataflow order.
        n_replayed: modules replayed.
        left_out: modules that were not, with the reason.
        inputs: what each replayed module ran on, by path.
        self_check: how well the reference's modules reproduced its own outputs.
    """

    comparison: str
    replay_of: str
    reference: str
    baseline: str | None
    target: str
    verdict: str
    reasons: tuple[str, ...]
    injecting: tuple[Injecting, ...]
    n_replayed: int
    left_out: tuple[LeftOut, ...]
    inputs: Mapping[str, Inputs]
    self_check: Mapping[str, Any]


@dataclass(frozen=True)
class _Cast:
    """One run of a replay: a model, what it runs on, which of its sites are recorded.

    Attributes:
        role: its role in the comparison.
        of: the run whose model, dtype and attention it has.
        source: where that model is.
        values: the inputs.
        wanted: sites to record.
        run: name of the run.
    """

    role: str
    of: RunManifest
    source: ModelSource
    values: ValueSource
    wanted: frozenset[Site]
    run: str


def replay(trace: Trace, request: ReplayRequest, *, progress: Progress = no_progress) -> ReplaySummary:
    """Replay the reference's modules on the values of a comparison's target, and compare.

    Makes the runs `<C>.replay-<dtype>`, replacing those of an earlier replay, and the comparison `<C>.replay`. R of its
    measurements is R_local: the error that a module adds on the target's own input, over what the reference's module
    adds there in the baseline's precision. With random inputs the target's modules are run as well, and all is named
    `<C>.random`.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: nothing can be replayed, or the model is not the one that the reference was captured from.
    """
    quiet_transformers()
    compared = read_comparison(trace, request.comparison)
    _check(compared, request)
    casts = _casts(trace, compared, request)
    self_check = check_reference(trace, casts[0].of, compared.reference_sites, casts[0].source, progress=progress)
    inputs: dict[str, Inputs] = {}
    for cast in casts:
        found = _play(trace, compared, request, cast, progress)
        if cast.role != "target":
            inputs.update({path: item for path, item in found.items() if item.trouble or path not in inputs})
    runs = {cast.role: cast.run for cast in casts}
    summary = compare(
        trace,
        ComparisonRequest(
            runs["reference"],
            runs.get("target", compared.target),
            runs.get("baseline"),
            _name(request),
            compared.thresholds,
            mapping=request.mapping,
        ),
        progress=progress,
    )
    missing = left_out(compared, casts[0].wanted, inputs, request.modules)
    verdict, reasons = enter_ledger(trace, summary, missing)
    replayed = {path: item for path, item in inputs.items() if not item.trouble}
    return ReplaySummary(
        summary.comparison,
        compared.name,
        runs["reference"],
        runs.get("baseline"),
        runs.get("target", compared.target),
        verdict,
        reasons,
        injecting_modules(trace, summary.comparison, inputs),
        len(replayed),
        tuple(missing),
        replayed,
        self_check,
    )


_SITES = """
SELECT here.module, here.site, here.target_site, here.phase, here.exec_order, here.r_ratio AS r_local, here.r_low,
       here.r_high, place.r_ratio AS r_in_place, here.state, here.verdict
FROM measurements AS here LEFT JOIN measurements AS place
    ON place.comparison = ? AND place.site = here.site AND place.target_site = here.target_site
    AND place.phase = here.phase AND place.prompt IS NULL
WHERE here.comparison = ? AND here.prompt IS NULL
ORDER BY phase_order(here.phase), here.exec_order, here.measurement
"""


def replayed_sites(trace: Trace, summary: ReplaySummary) -> list[dict[str, Any]]:
    """Every replayed site in dataflow order, with its R_local, its R in place, and what its module was replayed on."""
    rows = run_sql(trace, _SITES, [summary.replay_of, summary.comparison]).to_pylist()
    return [{**row, "inputs": _text(summary, row["module"])} for row in rows]


def _text(summary: ReplaySummary, module: str) -> str:
    return summary.inputs[module].text if module in summary.inputs else "at some prompts not the target's alone"


def _name(request: ReplayRequest) -> str:
    return request.comparison + (SUFFIX if request.random is None else RANDOM_SUFFIX)


def _check(compared: Compared, request: ReplayRequest) -> None:
    if compared.origin != "auto" and request.mapping is None:
        raise InputError(
            f"comparison {compared.name!r} used the mapping file {compared.origin}; name it again with --mapping"
        )
    if compared.baseline is None and request.random is not None:
        raise InputError(
            f"comparison {compared.name!r} has no baseline; random inputs need one: compare with --baseline"
        )


def _casts(trace: Trace, compared: Compared, request: ReplayRequest) -> list[_Cast]:
    """The runs to make, the reference's first."""
    reference, target = trace.manifest(compared.reference), trace.manifest(compared.target)
    if earlier := reference.provenance.get("replay_of"):
        raise InputError(f"comparison {compared.name!r} is a replay already; replay {earlier!r} again instead")
    source = find_model(reference, request.model)
    wanted = _wanted(compared, request.modules)
    if not wanted:
        raise InputError(
            f"comparison {compared.name!r} has no sites with values at token positions of modules "
            f"{', '.join(request.modules) or '*'}; replay needs those"
        )
    name = _name(request)
    values: ValueSource
    if request.random is None:
        values = MappedValues(trace, compared.target, compared.pairs, compared.target_sites)
    else:
        values = RandomInputs(request.random)
    casts = [_Cast("reference", reference, source, values, wanted, f"{name}-{reference.dtype}")]
    if compared.baseline is not None:
        baseline = trace.manifest(compared.baseline)
        if baseline.dtype == reference.dtype:
            raise InputError(
                f"reference and baseline of {compared.name!r} are both {baseline.dtype}: a replay would find no error"
            )
        own = replace(source, attention=baseline.provenance.get("attention"))
        casts.append(_Cast("baseline", baseline, own, values, wanted, f"{name}-{baseline.dtype}"))
    if isinstance(values, RandomInputs):
        names = {pair.target.module: pair.reference.module for pair in compared.pairs}
        ported = frozenset(pair.target for pair in compared.pairs if pair.reference in wanted)
        own = find_model(target, None)
        casts.append(_Cast("target", target, own, values.known_as(names), ported, f"{name}-target"))
    return casts


def _wanted(compared: Compared, modules: Sequence[str]) -> frozenset[Site]:
    """Reference sites to replay: outputs with one row of fixed width per position that the comparison matched."""
    positioned = {info.site for info in compared.reference_sites if info.positioned and info.features is not None}
    positioned &= {pair.reference for pair in compared.pairs if pair.reference.port == "output"}
    target = {info.site for info in compared.target_sites if info.positioned}
    known = {pair.reference for pair in compared.pairs if pair.target in target}
    return frozenset(
        site for site in positioned & known if not modules or any(fnmatchcase(site.module, glob) for glob in modules)
    )


def _play(
    trace: Trace, compared: Compared, request: ReplayRequest, cast: _Cast, progress: Progress
) -> dict[str, Inputs]:
    """Make one run; returns what each module ran on."""
    target = trace.manifest(compared.target)
    _remove_earlier(trace, cast.run, compared.name)
    progress("load", 0, 1)
    model = load_model(cast.source, parse_dtype(cast.of.dtype))
    ranks = request.tp or target.tp
    parts = parallel_linears(compared.pairs, target, ranks) if cast.role == "baseline" else {}
    replaying = Replaying(cast.values, cast.wanted)
    facts: dict[str, Any] = {
        "replay_of": compared.name,
        "replay_inputs_of": compared.target if request.random is None else f"random, seed {request.random}",
        "replayed_model_of": cast.of.run,
        **{name: cast.of.provenance.get(name) for name in ("config", "seed", "checkpoint_fingerprint")},
        "attention": cast.source.attention,
        "sums_rounded_in_parts": parts,
    }
    with rounded_like(model, parts):
        replay_run(
            trace,
            model,
            prompts_of(trace, target),
            replaying,
            run=cast.run,
            role=cast.role,
            model_name=str(cast.source.path),
            source=target,
            facts=facts,
            progress=progress,
        )
    return replaying.inputs


def _remove_earlier(trace: Trace, run: str, comparison: str) -> None:
    """Make room for a run that an earlier replay of the same comparison made; any other run is left alone."""
    if run in trace.run_names():
        earlier: RunManifest = trace.manifest(run)
        if earlier.provenance.get("replay_of") != comparison:
            raise InputError(f"{trace.path} has a run {run!r} that no replay of {comparison!r} made; remove it first")
        trace.remove_run(run)
