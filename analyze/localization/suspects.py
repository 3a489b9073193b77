"""The suspects of a comparison: where error may have been injected, most likely first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...store.trace import Trace
from ..verdict import FAIL, SHAPE_MISMATCH
from .candidates import Candidate, candidates
from .change_points import DRIFT, SPIKE
from .changes import SiteChange, site_changes
from .replays import replays_of
from .site_errors import SiteError, site_errors

ORIGIN, INHERITED = "origin", "inherited"

#: Suspects to name at least when any site fails: the runners-up are sites whose error is explained worst.
LEAST_SUSPECTS = 3
_TAU = "SELECT (thresholds->>'tau_r')::DOUBLE AS tau_r FROM comparisons WHERE comparison = ?"


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
    phases = site_errors(trace, comparison)
    changes = {phase: site_changes(sites) for phase, sites in phases.items()}
    return rank(candidates(phases, replays_of(trace, comparison)), phases, changes)


def open_suspects(trace: Trace, comparison: str) -> list[Suspect]:
    """Rank the sites before the first failing one whose R is beyond what is tolerated, as if they failed.

    Noise may explain every one of them, so none is a suspect by its R alone; a cause that explains its error decides.

    Args:
        trace: the trace.
        comparison: name of a comparison in it.

    Returns:
        Suspects by rank; empty when none exceeds the largest R of a clean site.

    Raises:
        InputError: there is no such comparison.
    """
    phases = site_errors(trace, comparison)
    (row,) = trace.query(_TAU, [comparison]).to_pylist()
    raised: dict[str, list[SiteError]] = {}
    for phase, sites in phases.items():
        first = next((place for place, site in enumerate(sites) if site.failed), len(sites))
        raised[phase] = [_as_if_failing(site, row["tau_r"]) for site in sites[:first]]
        if first < len(sites):
            break
    return rank(candidates(raised, replays_of(trace, comparison)), raised, dict.fromkeys(raised, ()))


def _as_if_failing(site: SiteError, tau_r: float) -> SiteError:
    beyond = site.equivalent_r is not None and site.equivalent_r > tau_r
    return replace(site, verdict=FAIL) if beyond else site


def rank(
    found: Sequence[Candidate],
    phases: Mapping[str, Sequence[SiteError]],
    changes: Mapping[str, Sequence[SiteChange]],
) -> list[Suspect]:
    """Order failing sites by how likely error enters there.

    Origins come first, as they come in time and dataflow; after them those whose R is hardly above the noise, spikes,
    sites whose shapes differ, and at last the sites that are explained worst.
    """
    own = [candidate for candidate in found if candidate.own]
    explaining = {number for candidate in found if not candidate.own for number in candidate.sufficient}
    kinds = {
        candidate.site.measurement: _kind(
            candidate, explaining, phases[candidate.site.phase], changes[candidate.site.phase]
        )
        for candidate in own
    }
    own.sort(key=lambda one: (one.site.state == SHAPE_MISMATCH, kinds[one.site.measurement] == SPIKE, one.weak))
    places = {(candidate.site.module, candidate.site.port) for candidate in own}
    rest = [one for one in found if not one.own and (one.site.module, one.site.port) not in places]
    rest.sort(key=lambda one: (bool(own) and one.site.phase != own[0].site.phase, -one.jump))
    chosen = own + rest[: max(LEAST_SUSPECTS - len(own), 0)]
    return [
        _suspect(number, one, kinds.get(one.site.measurement, INHERITED), phases)
        for number, one in enumerate(chosen, 1)
    ]


def _kind(candidate: Candidate, explaining: set[int], sites: Sequence[SiteError], changes: Sequence[SiteChange]) -> str:
    """What a site with an error of its own is.

    `drift` when it lies on a steady growth of R, which no single site injects; `spike` when its error ends inside a
    module around it, or nothing downstream fails because of it though something is downstream; else `origin`.
    """
    place = candidate.site.exec_order
    for change in changes:
        if change.kind == DRIFT and change.log_r_change > 0 and change.exec_low < place <= change.exec_high:
            return DRIFT
    if candidate.kept_in is not None:
        return SPIKE
    if candidate.site.measurement in explaining:
        return ORIGIN
    return SPIKE if any(site.exec_order > place and not site.failed for site in sites) else ORIGIN


def _suspect(number: int, candidate: Candidate, kind: str, phases: Mapping[str, Sequence[SiteError]]) -> Suspect:
    site = candidate.site
    return Suspect(
        number,
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
        _reason(candidate, kind, phases),
    )


def _reason(candidate: Candidate, kind: str, phases: Mapping[str, Sequence[SiteError]]) -> str:
    site, source = candidate.site, candidate.source
    if site.state == SHAPE_MISMATCH:
        return "its shape differs from the reference's"
    parts = ["R is undefined" if site.equivalent_r is None else f"R = {site.equivalent_r:.3g}"]
    if candidate.replayed is not None and candidate.replayed.r_local is not None:
        parts.append(f"R_local = {candidate.replayed.r_local:.3g} on the target's own inputs")
    if kind == INHERITED and source is not None:
        parts.append(f"explained by {source.site}: {candidate.jump:.2g} times the relative error that reaches it")
    elif candidate.good_inputs:
        parts.append("its inputs are good")
    elif source is None or candidate.jump == math.inf:
        parts.append("no failing site upstream of it hands on its error")
    else:
        parts.append(f"{candidate.jump:.2g} times the relative error that can have come from {source.site}")
    if kind == SPIKE and candidate.kept_in is not None:
        parts.append(f"its error does not reach {candidate.kept_in.site}")
    elif kind == SPIKE:
        parts.append("nothing downstream fails because of it")
    if kind == DRIFT:
        parts.append("R grows steadily over the sites around it")
    if kind != INHERITED:
        parts += _in_other_phases(site, phases)
    return "; ".join(parts)


def _in_other_phases(site: SiteError, phases: Mapping[str, Sequence[SiteError]]) -> list[str]:
    """Whether the same site fails in the other phases, where it was compared."""
    found = []
    for phase, sites in phases.items():
        others = [other for other in sites if (other.site, other.target_site) == (site.site, site.target_site)]
        if phase != site.phase and others:
            found.append(f"also in {phase}" if others[0].failed else f"not in {phase}")
    return found
