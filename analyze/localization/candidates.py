"""Failing sites and what speaks for their error being their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..moments import EXACT
from ..verdict import SHAPE_MISMATCH
from .dataflow import Dataflow, distinct
from .replays import Replayed
from .site_errors import SiteError

#: How much larger the relative excess error of a site may be than what reached it before it counts as its own. On 24
#: faults of a trained Llama, what a fault injects grows at most fourfold on its way (docs/localization.md).
GAIN = 10.0
#: Below this R an error is of the order of the baseline's own: another order of summation may do that.
WEAK = 1.5
#: A weak error explains less: where it seems to have grown by more than this, R must not have grown beyond the latter.
WEAK_GAIN, WEAK_GROWTH = 3.0, 1.3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A failing site.

    Attributes:
        site: the site.
        jump: its excess error over the largest that can have reached it; infinite when nothing did.
        source: the failing site that explains it best; None when nothing upstream fails.
        sufficient: measurements of all failing sites upstream that hand on enough to explain it.
        injected: see `Suspect.injected`.
        replayed: R_local of its module where the comparison was replayed.
        good_inputs: the module's inputs were compared, and none fails.
        kept_in: output of a module around it that its error does not reach; None when there is none.
    """

    site: SiteError
    jump: float
    source: SiteError | None
    sufficient: tuple[int, ...]
    injected: float | None
    replayed: Replayed | None
    good_inputs: bool
    kept_in: SiteError | None

    @property
    def weak(self) -> bool:
        """Its error is hardly more than the baseline's."""
        return _is_weak(self.site)

    @property
    def own(self) -> bool:
        """Its error is not explained by what came before it."""
        if self.replayed is not None and self.replayed.failed:
            return True
        return not self.sufficient


def candidates(
    phases: Mapping[str, Sequence[SiteError]], replays: Mapping[tuple[str, str], Replayed]
) -> list[Candidate]:
    """All failing sites, phases in time order and sites in dataflow order.

    In decode, what fails in prefill at the same place or before it counts as upstream: the cache hands it on.
    """
    found: list[Candidate] = []
    earlier: list[SiteError] = []
    for sites in phases.values():
        flow = Dataflow(sites)
        failing = [site for site in distinct(sites) if site.failed]
        for place, site in enumerate(failing):
            before = [*(source for source in earlier if source.exec_order <= site.exec_order), *failing[:place]]
            replayed = replays.get((site.module, site.phase)) if site.port == "output" else None
            found.append(_candidate(flow, site, before, replayed))
        earlier += failing
    return found


def _candidate(flow: Dataflow, site: SiteError, before: Sequence[SiteError], replayed: Replayed | None) -> Candidate:
    inputs = flow.inputs(site)
    injected = injected_error(site, inputs) if replayed is None else replayed.r_local
    good = bool(inputs) and flow.is_leaf(site.module) and not any(source.failed for source in inputs)
    handed: dict[int, tuple[float, SiteError]] = {}
    if site.state != SHAPE_MISMATCH:
        sources = [one for one in before if one.state != SHAPE_MISMATCH and flow.may_feed(one, site)]
        if good:
            sources = [one for one in sources if one.module == site.module]
        handed = {one.measurement: (flow.passed_on(one, site), one) for one in sources}
    reached, source = max(handed.values(), key=lambda pair: pair[0], default=(0.0, None))
    jump = math.inf if source is None else _quotient(site.excess, reached)
    sufficient = tuple(number for number, (much, one) in handed.items() if _explains(one, much, site))
    return Candidate(site, jump, source, sufficient, injected, replayed, good, flow.kept_in(site, 1 / GAIN))


def _explains(source: SiteError, handed: float, site: SiteError) -> bool:
    growth = _quotient(site.excess, handed)
    if growth <= WEAK_GAIN or growth > GAIN or not _is_weak(source):
        return growth <= GAIN
    return (site.equivalent_r or math.inf) <= (source.equivalent_r or 0.0) * WEAK_GROWTH


def _is_weak(site: SiteError) -> bool:
    return site.equivalent_r is not None and site.equivalent_r < WEAK


def _quotient(excess: float, reached: float) -> float:
    if math.isinf(reached):
        return 1.0
    return excess / reached if reached > 0 else math.inf


def injected_error(site: SiteError, inputs: Sequence[SiteError]) -> float | None:
    """Error that a module adds beyond what its inputs bring, in units of the baseline's; None without inputs.

    If a module passes errors on as it passes on the baseline's, an input with R_in brings R_in^2 - 1 times the
    baseline's squared error beyond the baseline's own, so what remains of the output is
    sqrt(R_out^2 - (R_in^2 - 1)): R itself when the inputs are as good as the baseline's, at most 1 when everything is
    inherited.
    """
    known = [1.0 if source.state == EXACT else source.equivalent_r for source in inputs]
    if site.equivalent_r is None or not known or None in known:
        return None
    brought = max(max(r for r in known if r is not None) ** 2 - 1.0, 0.0)
    return math.sqrt(max(site.equivalent_r**2 - brought, 0.0))
