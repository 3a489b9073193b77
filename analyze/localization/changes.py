"""Change points of R over the sites of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .change_points import ChangePoint, change_points
from .dataflow import distinct
from .site_errors import SiteError


@dataclass(frozen=True, slots=True)
class SiteChange:
    """A place in dataflow order where R changes; see `change_points.ChangePoint`.

    Attributes:
        phase: of the sites.
        kind: `step`, `spike` or `drift`.
        site, exec_order: first site on the new level; the first of a drift.
        site_low, exec_low, site_high, exec_high: first and last site that it may be with 95 % probability; first and
            last site of a drift.
        log_r_before: level of log R before it.
        log_r_change: log of R after over R before.
    """

    phase: str
    kind: str
    site: str
    exec_order: int
    site_low: str
    exec_low: int
    site_high: str
    exec_high: int
    log_r_before: float
    log_r_change: float


def series(sites: Sequence[SiteError]) -> list[SiteError]:
    """The sites of a phase that have a log R: distinct values, and R neither undefined nor zero.

    Sites that are exact in both runs say nothing about R and are left out, as are non-finite ones; where only the
    baseline is exact, `SiteError.equivalent_r` takes the place of the infinite R.
    """
    return [site for site in distinct(sites) if site.log_r is not None]


def site_changes(sites: Sequence[SiteError]) -> list[SiteChange]:
    """Changes of log R over the sites of one phase, which come in dataflow order."""
    known = series(sites)
    values = np.array([site.log_r for site in known], np.float64)
    spread = np.array([site.log_spread for site in known])
    return [_named(known, change) for change in change_points(values, spread)]


def _named(known: Sequence[SiteError], change: ChangePoint) -> SiteChange:
    at, low, high = known[change.index], known[change.low], known[change.high]
    return SiteChange(
        at.phase,
        change.kind,
        at.site,
        at.exec_order,
        low.site,
        low.exec_order,
        high.site,
        high.exec_order,
        change.before,
        change.change,
    )
