"""The replay of a comparison: two runs of the reference's modules on the target's values, compared with the target."""

from __future__ import annotations

import shutil
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
from .recorder import Inputs, Replaying
from .reductions import parallel_linears, rounded_like
from .self_check import check_reference, find_model
from .values import MappedValues


@dataclass(frozen=True)
class ReplayRequest:
    """What to replay.

    Attributes:
        comparison: the comparison whose target gives the inputs.
        model: folder of the reference's model; where the reference was captured from by default.
        modules: globs over the reference's module paths; all by default.
        tp: ranks over which the target sums row-parallel projections; the target's own by default.
        mapping: the component_mapping.json that the comparison used, if it used one.
    """

    comparison: str
    model: Path | None = None
    modules: tuple[str, ...] = ()
    tp: int | None = None
    mapping: Path | None = None


@dataclass(frozen=True)
class ReplaySummary:
    """Outcome of a replay; everything else is in the catalog under the comparison `<C>.replay`.

    Attributes:
        comparison: its name.
        replay_of: the comparison that was replayed.
        reference, baseline, target: the runs that it compared; the first two are the replays.
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


def replay(trace: Trace, request: ReplayRequest, *, progress: Progress = no_progress) -> ReplaySummary:
    """Replay the reference's modules on the values of a comparison's target, and compare.

    Makes the runs `<C>.replay-<dtype>`, replacing those of an earlier replay, and the comparison `<C>.replay`. R of its
    measurements is R_local: the error that a module adds on the target's own input, over what the reference's module
    adds there in the baseline's precision.

    Raises:
        TraceNotFoundError: there is no such comparison.
        InputError: nothing can be replayed, or the model is not the one that the reference was captured from.
    """
    quiet_transformers()
    compared = read_comparison(trace, request.comparison)
    if compared.origin != "auto" and request.mapping is None:
        raise InputError(
            f"comparison {compared.name!r} used the mapping file {compared.origin}; name it again with --mapping"
        )
    reference = trace.manifest(compared.reference)
    source = find_model(reference, request.model)
    wanted = _wanted(compared, request.modules)
    if not wanted:
        raise InputError(
            f"comparison {compared.name!r} has no sites with values at token positions of modules "
            f"{', '.join(request.modules) or '*'}; replay needs those"
        )
    self_check = check_reference(trace, reference, compared.reference_sites, source, progress=progress)
    runs: dict[str, str] = {}
    inputs: dict[str, Inputs] = {}
    for role, of in (("reference", compared.reference), ("baseline", compared.baseline)):
        if of is not None:
            runs[role] = f"{compared.name}{SUFFIX}-{trace.manifest(of).dtype}"
            found = _replay_one(trace, compared, request, source, runs[role], role, of, wanted, progress)
            inputs.update({path: item for path, item in found.items() if item.trouble or path not in inputs})
    if len(set(runs.values())) < len(runs):
        raise InputError(
            f"reference and baseline of {compared.name!r} have the same dtype; a replay would find no error"
        )
    summary = compare(
        trace,
        ComparisonRequest(
            runs["reference"],
            compared.target,
            runs.get("baseline"),
            f"{compared.name}{SUFFIX}",
            compared.thresholds,
            mapping=request.mapping,
        ),
        progress=progress,
    )
    missing = left_out(compared, wanted, inputs, request.modules)
    verdict, reasons = enter_ledger(trace, summary, missing, inputs)
    replayed = {path: item for path, item in inputs.items() if not item.trouble}
    return ReplaySummary(
        summary.comparison,
        compared.name,
        runs["reference"],
        runs.get("baseline"),
        compared.target,
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
    return [{**row, "inputs": summary.inputs[row["module"]].text} for row in rows]


def _wanted(compared: Compared, modules: Sequence[str]) -> frozenset[Site]:
    """Reference sites to replay: outputs with positions that the comparison matched."""
    positioned = {info.site for info in compared.reference_sites if info.positioned}
    positioned &= {pair.reference for pair in compared.pairs if pair.reference.port == "output"}
    target = {info.site for info in compared.target_sites if info.positioned}
    known = {pair.reference for pair in compared.pairs if pair.target in target}
    return frozenset(
        site for site in positioned & known if not modules or any(fnmatchcase(site.module, glob) for glob in modules)
    )


def _replay_one(
    trace: Trace,
    compared: Compared,
    request: ReplayRequest,
    source: ModelSource,
    run: str,
    role: str,
    of: str,
    wanted: frozenset[Site],
    progress: Progress,
) -> dict[str, Inputs]:
    target, like = trace.manifest(compared.target), trace.manifest(of)
    _remove_earlier(trace, run, compared.name)
    progress("load", 0, 1)
    model = load_model(replace(source, attention=like.provenance.get("attention")), parse_dtype(like.dtype))
    parts = parallel_linears(compared.pairs, target, request.tp or target.tp) if role == "baseline" else {}
    values = MappedValues(trace, compared.target, compared.pairs, compared.target_sites)
    replaying = Replaying(values, wanted)
    facts: dict[str, Any] = {
        "replay_of": compared.name,
        "replay_inputs_of": compared.target,
        "replayed_model_of": of,
        "checkpoint_fingerprint": like.provenance.get("checkpoint_fingerprint"),
        "attention": like.provenance.get("attention"),
        "sums_rounded_in_parts": parts,
    }
    with rounded_like(model, parts):
        replay_run(
            trace,
            model,
            prompts_of(trace, target),
            replaying,
            run=run,
            role=role,
            model_name=str(source.path),
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
            raise InputError(
                f"{trace.path} has a run {run!r} that no replay of {comparison!r} made; rename or remove it"
            )
        shutil.rmtree(trace.run_folder(run))
