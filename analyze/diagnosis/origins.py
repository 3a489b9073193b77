"""Where diagnosis starts: sites at which error comes in."""

from __future__ import annotations

from dataclasses import dataclass

from ...store.trace import Trace

_FIRST = """
SELECT site, target_site, phase, r_ratio, state, exec_order, measurement
FROM measurements WHERE comparison = ? AND prompt IS NULL AND verdict = 'fail'
QUALIFY row_number() OVER (PARTITION BY phase ORDER BY exec_order, measurement) = 1
ORDER BY CASE phase WHEN 'prefill' THEN 0 WHEN 'decode' THEN 1 ELSE 2 END
"""


@dataclass(frozen=True)
class Origin:
    """A site at which error comes in: names in reference and target, phase, R (None: undefined) and state."""

    site: str
    target_site: str
    phase: str
    r_ratio: float | None
    state: str
    exec_order: int


def origins(trace: Trace, comparison: str) -> list[Origin]:
    """The first failing site of every phase; of a later phase only if it comes before that of the earlier one."""
    found: list[Origin] = []
    for row in trace.query(_FIRST, [comparison]).to_pylist():
        if not found or row["exec_order"] < found[0].exec_order:
            found.append(
                Origin(row["site"], row["target_site"], row["phase"], row["r_ratio"], row["state"], row["exec_order"])
            )
    return found
