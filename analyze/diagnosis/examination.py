"""Testing suspects against named hypotheses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from . import activations, factors, linear, norms, output, places, residual, rotary, routing, whole
from .causes import entry_of
from .experts import misplaced_expert
from .finding import Finding, keep
from .hypothesis import INHERITED, Family, Prediction, Scored, score
from .origins import Origin, origins
from .partial_sum import missing_sum
from .precision import over_precise
from .ranking import UNKNOWN, Decision, decide, decide_in_noise
from .runs import ComparedRuns, Counterpart
from .scene import Scene
from .signatures import weights, where
from .weight_error import rounded_weight

#: Laws come first: what they say that a site should hold is what the others start from.
LAWS: tuple[Family, ...] = (
    *norms.FAMILIES,
    *rotary.FAMILIES,
    *activations.FAMILIES,
    *linear.FAMILIES,
    *residual.FAMILIES,
    *routing.FAMILIES,
    *output.FAMILIES,
)
REARRANGEMENTS: tuple[Family, ...] = (*places.FAMILIES, *factors.FAMILIES)
#: How much more (squared) a fitted prediction has to explain than one without fitted numbers.
_FITTED = 1.5
_ALSO_COMPARED = """
SELECT target_site FROM measurements
WHERE comparison = ? AND site = ? AND phase = ? AND target_site <> ? AND prompt IS NULL AND verdict = 'pass'
"""


def diagnose(trace: Trace, comparison: str, *, progress: Progress = no_progress) -> list[Finding]:
    """Name the cause at every site where error is injected, from the trace alone; the findings are kept in the catalog.

    Sites before the first failing one are examined too if their R is beyond what is tolerated, and a cause that
    explains their error is a finding: it is evidence where R is none.

    Raises:
        TraceNotFoundError: there is no such comparison.
        IntegrityError: a shard is damaged.
    """
    runs = ComparedRuns(trace, comparison)
    suspects = origins(trace, comparison)
    findings: list[Finding] = []
    for number, origin in enumerate(suspects):
        progress(origin.site, number, len(suspects))
        finding = examine(runs, origin, len(findings) + 1)
        if finding is not None and (finding.is_named or not origin.in_noise):
            findings.append(finding)
        trace.release_pages()
    findings += over_precise(runs, len(findings) + 1)
    keep(trace, comparison, findings)
    return findings


def examine(runs: ComparedRuns, origin: Origin, rank: int) -> Finding | None:
    """The finding for one suspect; one whose error may be noise is `unknown` unless a cause explains it."""
    try:
        scene = open_scene(runs, origin)
    except LookupError:
        if origin.in_noise:
            return None
        unread = whole.unreadable(runs, origin)
        return _finding(runs, origin, rank, unread, _evidence(unread))
    broken = whole.broken(scene)
    if broken is not None:
        return _finding(runs, origin, rank, broken, {"where": where(scene), **_evidence(broken)})
    if origin.in_noise:
        decision = decide_in_noise(scores(scene))
        return _finding(runs, origin, rank, decision, {"where": where(scene), "in_noise": True, **_evidence(decision)})
    decision = _refined(runs, origin, decide(scene.error, scores(scene)))
    if decision.cause == UNKNOWN:
        decision = misplaced_expert(scene) or missing_sum(scene) or rounded_weight(scene) or decision
    evidence = {"where": where(scene), "weights": weights(scene), **_evidence(decision)}
    return _finding(runs, origin, rank, decision, evidence)


def _refined(runs: ComparedRuns, origin: Origin, decision: Decision) -> Decision:
    """Two projections exchanged while the fused product that holds both is right: it is split in another order."""
    if decision.cause != "exchanged_projections" or decision.best is None:
        return decision
    right = runs.trace.query(_ALSO_COMPARED, [runs.comparison, origin.site, origin.phase, origin.target_site])
    if not right.num_rows:
        return decision
    fused = right.to_pylist()[0]["target_site"]
    prediction = replace(
        decision.best.prediction,
        cause="split_order",
        summary=f"{decision.best.prediction.summary}, though {fused} is right: it is split in another order",
        remedy="split the fused product in the order in which the conversion stacks the weights",
    )
    return replace(decision, cause="split_order", best=replace(decision.best, prediction=prediction))


def open_scene(runs: ComparedRuns, origin: Origin) -> Scene:
    """The suspect's values and surroundings.

    Raises:
        LookupError: nothing of it can be compared.
    """
    info = runs.sites[origin.site]
    counterparts: Sequence[Counterpart] = runs.counterparts.get(origin.site, ())
    counterpart = next((item for item in counterparts if item.site.name == origin.target_site), None)
    if counterpart is None:
        raise LookupError(origin.site)
    return Scene(runs, info, counterpart, origin.phase)


def predictions(scene: Scene) -> Iterator[Prediction]:
    """What every hypothesis that applies predicts."""
    for family in LAWS:
        for prediction in family(scene):
            if prediction.cause == INHERITED and prediction.values.shape == scene.target.shape:
                scene.expected = prediction.values
            yield prediction
    for family in REARRANGEMENTS:
        yield from family(scene)


def scores(scene: Scene) -> list[Scored]:
    """All predictions held against the target; of each cause the best, so that memory stays bounded."""
    best: dict[str, Scored] = {}
    for prediction in predictions(scene):
        scored = score(scene, prediction)
        known = best.get(prediction.cause)
        if scored is not None and (known is None or _weight(scored) < _weight(known)):
            best[prediction.cause] = scored
    return list(best.values())


def _weight(scored: Scored) -> float:
    """What a prediction leaves; a fitted number has to do clearly better than a round one."""
    return scored.residual * (_FITTED if scored.prediction.fitted else 1.0)


def _evidence(decision: Decision) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if decision.best is not None:
        best = decision.best
        if best.prediction.values.size:
            facts |= {
                "explained": best.explained,
                "share": best.share,
                "residual_ratio": best.residual_ratio,
            }
        facts["parameters"] = best.prediction.parameters
        if decision.cause == UNKNOWN:
            facts["best_guess"] = best.prediction.cause
    if decision.runner_up is not None:
        facts["runner_up"] = {
            "cause": decision.runner_up.prediction.cause,
            "explained": decision.runner_up.explained,
            "residual_ratio": decision.runner_up.residual_ratio,
        }
    if decision.reason:
        facts["reason"] = decision.reason
    return facts


def _finding(runs: ComparedRuns, origin: Origin, rank: int, decision: Decision, evidence: dict[str, Any]) -> Finding:
    evidence = {"r_ratio": origin.r_ratio, **evidence}
    command = f"sleuth plot qq {runs.trace.path} {runs.comparison} --phase {origin.phase} --site '{origin.site}'"
    if decision.cause == UNKNOWN or decision.best is None:
        summary = f"no known cause explains the error of {origin.site}: {decision.reason}"
        remedy = "compare the code of both models at this site; record its inputs (--io both) to test more causes"
        return Finding(
            rank, origin.site, origin.target_site, origin.phase, UNKNOWN, 0.0, summary, remedy, "", evidence, command
        )
    prediction = decision.best.prediction
    summary, remedy = prediction.summary, prediction.remedy
    if decision.cause == INHERITED:
        remedy = "look at what this site is computed from: the error came in with it"
    return Finding(
        rank, origin.site, origin.target_site, origin.phase, decision.cause, decision.confidence, summary, remedy,
        entry_of(decision.cause), evidence, command,
    )  # fmt: skip
