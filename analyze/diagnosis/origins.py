"""Where diagnosis starts: the suspects that inject error of their own."""

from __future__ import annotations

from dataclasses import dataclass

from ...store.trace import Trace
from ..localization.suspects import INHERITED, suspects

#: Suspects that are examined; what comes after them has been explained by none.
_MOST = 12
_STATES = "SELECT measurement, state FROM measurements WHERE comparison = ? AND prompt IS NULL"


@dataclass(frozen=True)
class Origin:
    """A site at which error comes in: names in reference and target, phase, R (None: undefined) and state."""

    site: str
    target_site: str
    phase: str
    r_ratio: float | None
    state: str
    reason: str


def origins(trace: Trace, comparison: str) -> list[Origin]:
    """The suspects of a comparison, without those that only pass on what they are given.

    Raises:
        InputError: there is no such comparison.
    """
    states = {row["measurement"]: row["state"] for row in trace.query(_STATES, [comparison]).to_pylist()}
    return [
        Origin(one.site, one.target_site, one.phase, one.r_ratio, states[one.measurement], one.reason)
        for one in suspects(trace, comparison)
        if one.kind != INHERITED
    ][:_MOST]
