"""Where diagnosis starts: the suspects that inject error of their own, or that may where noise hides it."""

from __future__ import annotations

from dataclasses import dataclass

from ...store.trace import Trace
from ..localization.suspects import INHERITED, Suspect, open_suspects, suspects

#: Suspects that are examined; what comes after them has been explained by none.
_MOST = 12
_STATES = "SELECT measurement, state FROM measurements WHERE comparison = ? AND prompt IS NULL"


@dataclass(frozen=True)
class Origin:
    """A site at which error comes in, or may come in.

    Attributes:
        site, target_site: its names in reference and target.
        phase: `prefill`, `decode` or `forward`.
        r_ratio: R; None where it is undefined.
        state: state of its measurement.
        reason: why it is suspected.
        in_noise: it does not fail: noise may explain its R, unless a cause explains its error.
    """

    site: str
    target_site: str
    phase: str
    r_ratio: float | None
    state: str
    reason: str
    in_noise: bool = False


def origins(trace: Trace, comparison: str) -> list[Origin]:
    """The suspects of a comparison, without those that only pass on what they are given.

    Before them come sites that do not fail, and that R does not acquit either.

    Raises:
        InputError: there is no such comparison.
    """
    states = {row["measurement"]: row["state"] for row in trace.query(_STATES, [comparison]).to_pylist()}

    def of(found: list[Suspect], in_noise: bool) -> list[Origin]:
        return [
            Origin(one.site, one.target_site, one.phase, one.r_ratio, states[one.measurement], one.reason, in_noise)
            for one in found
            if one.kind != INHERITED
        ][:_MOST]

    return [*of(open_suspects(trace, comparison), True), *of(suspects(trace, comparison), False)]
