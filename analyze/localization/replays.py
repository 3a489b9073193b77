"""What a replay of a comparison says: R_local, the error of modules on the target's own inputs."""

from __future__ import annotations

from dataclasses import dataclass

from ...store.trace import Trace

#: Comparisons made by `sleuth replay` are named after the one they replay.
SUFFIX = ".replay"

_QUERY = """
SELECT module, phase, arg_max(r_ratio, coalesce(r_ratio, 0)) AS r_local, bool_or(verdict = 'fail') AS failed
FROM measurements m
WHERE comparison = ? AND prompt IS NULL AND port = 'output' AND EXISTS (
    SELECT 1 FROM comparisons c JOIN runs r ON r.run = c.baseline
    WHERE c.comparison = m.comparison AND r.provenance->>'replay_of' = ?)
GROUP BY module, phase
"""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A module in one phase, run on the target's own inputs.

    Attributes:
        r_local: ||target - replay|| over ||rounded replay - replay||, the largest of its outputs; None if undefined.
        failed: it is above its limit.
    """

    r_local: float | None
    failed: bool


def replays_of(trace: Trace, comparison: str) -> dict[tuple[str, str], Replayed]:
    """What a replay found, by module and phase; empty when the comparison was not replayed."""
    rows = trace.query(_QUERY, [comparison + SUFFIX, comparison]).to_pylist()
    return {(row["module"], row["phase"]): Replayed(row["r_local"], row["failed"]) for row in rows}
