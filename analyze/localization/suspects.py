"""The suspects of a comparison: where error may have been injected, most likely first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...store.trace import Trace
from ..verdict import SHAPE_MISMATCH
from .dataflow import Dataflow, distinct
from .site_errors import SiteError, site_errors

ORIGIN, SPIKE, DRIFT, INHERITED = "origin", "spike", "drift", "inherited"

#: How much larger the relative excess error of a site may be than what fed it before it counts as its own. Measured
#: on 24 faults of a trained Llama, what a fault injects grows at most fourfold on its way (`docs/localization.md`).
GAIN = 10.0
#: Suspects to name at least when any site fails: the runners-up are sites whose error is explained worst.
LEAST_SUSPECTS = 3


@dataclass(frozen=True, slots=True)
class Suspect:
    """A site that may inject error of its own.

    Attributes:
        rank: 1 for the most likely origin.
        site: site of the reference.
        target_site: site of the target that was compared with it.
        module: module path of the reference site.
        phase: `prefill` or `decode`.
        exec_order: place in dataflow order.
        measurement: number of its measurement over all prompts in the comparison.
        r_ratio: R; None when it is undefined.
        r_low, r_high: its interval; None when there is none.
        q_value: false-discovery rate at which it is significant; None when nothing is calibrated.
        injected: R_local where inputs or a replay tell: error that the module adds to what it inherits, over what the
            baseline adds; None when they do not.
        kind: `origin`, `spike`, `drift` or `inherited`.
        reason: one sentence that says why it is suspected, with numbers.
    """

    rank: int
    site: str
    target_site: str
    module: str
    phase: str
    exec_order: int
    measurement: int
    r_ratio: float | None
    r_low: float | None
    r_high: float | None
    q_value: float | None
    injected: float | None
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A failing site, and what speaks for its error being its own.

    jump: its excess error over the largest that can have reached it; infinite when nothing did.
    source: the failing site that explains it best, None when nothing upstream fails.
    """

    site: SiteError
    jump: float
    source: SiteError | None
    injected: float | None

    @property
    def own(self) -> bool:
        return self.jump > GAIN


def suspects(trace: Trace, comparison: str) -> list[Suspect]:
    """Rank the sites of a comparison that may inject error, the earliest significant injection first.

    Args:
        trace: the trace.
        comparison: name of a comparison in it.

    Returns:
        Suspects by rank; empty when no site fails.

    Raises:
        InputError: there is no such comparison.
    """
    candidates: list[_Candidate] = []
    phases = site_errors(trace, comparison)
    flows = {phase: Dataflow(sites) for phase, sites in phases.items()}
    earlier: list[SiteError] = []
    for phase, sites in phases.items():
        failing = [site for site in distinct(sites) if site.failed]
        for place, site in enumerate(failing):
            before = [*(source for source in earlier if source.exec_order <= site.exec_order), *failing[:place]]
            candidates.append(_candidate(flows[phase], site, before))
        earlier += failing
    return _ranked(candidates, phases)


def _candidate(flow: Dataflow, site: SiteError, before: Sequence[SiteError]) -> _Candidate:
    """Judge a failing site against the failing sites before it."""
    inputs = flow.inputs(site)
    injected = injected_error(site, inputs)
    if site.state == SHAPE_MISMATCH:
        return _Candidate(site, math.inf, None, injected)
    sources = [source for source in before if source.state != SHAPE_MISMATCH and flow.may_feed(source, site)]
    if inputs and flow.is_leaf(site.module) and not any(source.failed for source in inputs):
        sources = [source for source in sources if source.site == site.site]
    source = max(sources, key=lambda source: flow.passed_on(source, site), default=None)
    if source is None:
        return _Candidate(site, math.inf, None, injected)
    reached = flow.passed_on(source, site)
    jump = 1.0 if math.isinf(reached) else site.excess / reached if reached > 0 else math.inf
    return _Candidate(site, jump, source, injected)


def injected_error(site: SiteError, inputs: Sequence[SiteError]) -> float | None:
    """Error that a module adds beyond what its inputs bring, in units of the baseline's; None without inputs.

    If a module passes errors on as it passes on the baseline's, an input with R_in brings R_in^2 - 1 times the
    baseline's squared error beyond the baseline's own, so what remains of the output is
    sqrt(R_out^2 - (R_in^2 - 1)): R itself when the inputs are as good as the baseline's, at most 1 when everything is
    inherited.
    """
    known = [source.equivalent_r for source in inputs if source.equivalent_r is not None]
    if site.equivalent_r is None or not known:
        return None
    brought = max(max(known) ** 2 - 1.0, 0.0)
    return math.sqrt(max(site.equivalent_r**2 - brought, 0.0))


def _ranked(candidates: Sequence[_Candidate], phases: dict[str, list[SiteError]]) -> list[Suspect]:
    own = [candidate for candidate in candidates if candidate.own]
    explaining = {candidate.source.measurement for candidate in candidates if candidate.source and not candidate.own}
    kinds = {
        candidate.site.measurement: _kind(candidate, explaining, phases[candidate.site.phase]) for candidate in own
    }
    own.sort(
        key=lambda candidate: (kinds[candidate.site.measurement] != ORIGIN, candidate.site.state == SHAPE_MISMATCH)
    )
    rest = [candidate for candidate in candidates if not candidate.own]
    rest.sort(key=lambda candidate: -candidate.jump)
    chosen = own + rest[: max(LEAST_SUSPECTS - len(own), 0)]
    return [
        _suspect(rank, candidate, kinds.get(candidate.site.measurement, INHERITED))
        for rank, candidate in enumerate(chosen, 1)
    ]


def _kind(candidate: _Candidate, explaining: set[int], sites: Sequence[SiteError]) -> str:
    """`spike` when nothing downstream fails because of it though something is downstream."""
    if candidate.site.measurement in explaining:
        return ORIGIN
    later = [site for site in sites if site.exec_order > candidate.site.exec_order]
    return SPIKE if any(not site.failed for site in later) else ORIGIN


def _suspect(rank: int, candidate: _Candidate, kind: str) -> Suspect:
    site = candidate.site
    return Suspect(
        rank,
        site.site,
        site.target_site,
        site.module,
        site.phase,
        site.exec_order,
        site.measurement,
        site.r_ratio,
        site.r_low,
        site.r_high,
        site.q_value,
        candidate.injected,
        kind,
        _reason(candidate, kind),
    )


def _reason(candidate: _Candidate, kind: str) -> str:
    site, source = candidate.site, candidate.source
    r = "R is undefined" if site.equivalent_r is None else f"R = {site.equivalent_r:.3g}"
    if site.state == SHAPE_MISMATCH:
        return "its shape differs from the reference's"
    if source is None:
        return f"{r}, and no site upstream of it fails"
    if kind == INHERITED:
        return f"{r}; {candidate.jump:.2g} times the relative error that {source.site} hands on, which explains it"
    return f"{r}; {candidate.jump:.2g} times the relative error that {source.site} can have handed on"
