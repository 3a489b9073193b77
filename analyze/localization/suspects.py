"""The suspects of a comparison: where error may have been injected, most likely first."""

from __future__ import annotations

from dataclasses import dataclass


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
