"""What a comparison measured, site by site in dataflow order, as localization reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...store.errors import InputError
from ...store.trace import Trace
from ..moments import BASELINE_EXACT, MEASURED
from ..verdict import FAIL, UNDECIDED, UNIT_ROUNDOFF

_QUERY = """
SELECT m.measurement, m.site, m.target_site, m.module, m.port, m.slot, m.call, m.exec_order, m.phase, m.n, m.r_ratio,
       m.r_low, m.r_high, m.q_value, m.reference_norm, m.baseline_error, m.target_error, m.relative_l2,
       m.relative_l2_baseline, m.state, m.verdict, r.dtype, (c.thresholds->>'relative_l2')::DOUBLE AS tolerance
FROM measurements m JOIN comparisons c USING (comparison) JOIN runs r ON r.run = c.target
WHERE comparison = ? AND prompt IS NULL
ORDER BY phase_order(m.phase), m.exec_order, m.measurement
"""


@dataclass(frozen=True, slots=True)
class SiteError:
    """A compared site in one phase, over all prompts; numbers are None where they are undefined.

    Attributes:
        measurement, site, target_site, module, port, slot, call, exec_order, phase, n, state, verdict, q_value: as in
            the table `measurements`.
        r_ratio, r_low, r_high: R and its interval.
        relative: ||t - r|| / ||r||.
        relative_baseline: ||b - r|| / ||r||.
        content: reference norm and both errors: equal for sites that hold the same values.
        equivalent_r: R; where the baseline is exact, the target's relative error over the unit roundoff of its dtype,
            which is what rounding once could have added; without a baseline, the relative error over its limit. None
            where it is undefined.
    """

    measurement: int
    site: str
    target_site: str
    module: str
    port: str
    slot: str
    call: int
    exec_order: int
    phase: str
    n: int
    r_ratio: float | None
    r_low: float | None
    r_high: float | None
    q_value: float | None
    relative: float | None
    relative_baseline: float | None
    content: tuple[float | None, float | None, float | None]
    equivalent_r: float | None
    state: str
    verdict: str

    @property
    def failed(self) -> bool:
        """It fails its limit."""
        return self.verdict == FAIL

    @property
    def undecided(self) -> bool:
        """Nothing can be said about it."""
        return self.verdict == UNDECIDED

    @property
    def log_r(self) -> float | None:
        """log of `equivalent_r`; None where it is undefined or 0."""
        r = self.equivalent_r
        return math.log(r) if r is not None and 0.0 < r < math.inf else None

    @property
    def log_spread(self) -> float:
        """Standard error of log R, from its 95 % interval; 0 where there is none."""
        if self.r_low is None or self.r_high is None or not 0.0 < self.r_low <= self.r_high < math.inf:
            return 0.0
        return math.log(self.r_high / self.r_low) / (2 * 1.96)

    @property
    def excess(self) -> float:
        """Relative error of the target beyond the baseline's, sqrt(e_t^2 - e_b^2), at least 0; inf if undefined.

        Unlike R it hardly changes on the way through a model, because it does not depend on how much the baseline
        itself has lost by then: what a module passes on of it is close to what it received.
        """
        if self.relative is None or not math.isfinite(self.relative):
            return math.inf if self.failed else 0.0
        return math.sqrt(max(self.relative**2 - (self.relative_baseline or 0.0) ** 2, 0.0))


def site_errors(trace: Trace, comparison: str) -> dict[str, list[SiteError]]:
    """The compared sites of each phase, in dataflow order; phases in time order.

    Raises:
        InputError: there is no such comparison.
    """
    known = [row["comparison"] for row in trace.query("SELECT comparison FROM comparisons ORDER BY 1").to_pylist()]
    if comparison not in known:
        names = ", ".join(known) or f"none yet; make one with 'sleuth compare {trace.path} ...'"
        raise InputError(f"{trace.path} has no comparison {comparison!r}; its comparisons: {names}")
    phases: dict[str, list[SiteError]] = {}
    for row in trace.query(_QUERY, [comparison]).to_pylist():
        phases.setdefault(row["phase"], []).append(_site_error(row))
    return phases


def _site_error(row: dict[str, Any]) -> SiteError:
    return SiteError(
        **{name: row[name] for name in _COPIED},
        relative=row["relative_l2"],
        relative_baseline=row["relative_l2_baseline"],
        content=(row["reference_norm"], row["baseline_error"], row["target_error"]),
        equivalent_r=_equivalent_r(row),
    )


_COPIED = (
    "measurement", "site", "target_site", "module", "port", "slot", "call", "exec_order", "phase", "n", "r_ratio",
    "r_low", "r_high", "q_value", "state", "verdict",
)  # fmt: skip


def _equivalent_r(row: dict[str, Any]) -> float | None:
    if row["state"] == MEASURED and row["tolerance"] is not None:
        return None if row["relative_l2"] is None else float(row["relative_l2"] / row["tolerance"])
    if row["state"] == MEASURED:
        return None if row["r_ratio"] is None else float(row["r_ratio"])
    if row["state"] == BASELINE_EXACT and row["dtype"] in UNIT_ROUNDOFF and row["relative_l2"] is not None:
        return float(row["relative_l2"] / UNIT_ROUNDOFF[row["dtype"]])
    return None
