"""Which modules add error of their own: the innermost failing ones of a replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...store.trace import Trace
from .recorder import Inputs


@dataclass(frozen=True)
class Injecting:
    """A module that adds error of its own, in dataflow order.

    Attributes:
        module: its path in the reference.
        target_site: the site of the target that shows it.
        phases: where.
        r_local: the largest R_local of its sites; None where it is undefined.
        code: modules whose own code computed its input from captured values; the error may have entered there.
        through: reference modules on the way of which the target recorded nothing; it may have entered there too.
        part_of: failing modules around it.
    """

    module: str
    target_site: str
    phases: tuple[str, ...]
    r_local: float | None
    code: tuple[str, ...]
    through: tuple[str, ...]
    part_of: tuple[str, ...]

    @property
    def text(self) -> str:
        """In one line."""
        r_local = "undefined" if self.r_local is None else f"{self.r_local:.3g}"
        before = [f"the code of {name} before it" for name in self.code] + list(self.through)
        doubt = f", or {', '.join(before)}" if before else ""
        return f"{self.module}{doubt} ({', '.join(self.phases)}; in the target {self.target_site}), R_local = {r_local}"


_QUERY = """
SELECT module, arg_min(target_site, measurement) AS target_site, list(DISTINCT phase) AS phases,
       max(r_ratio) AS r_local, min(exec_order) AS exec_order
FROM measurements WHERE comparison = ? AND prompt IS NULL AND verdict = 'fail'
GROUP BY module ORDER BY exec_order
"""


def injecting_modules(trace: Trace, comparison: str, inputs: Mapping[str, Inputs]) -> tuple[Injecting, ...]:
    """Failing modules of a replay without failing modules inside them, in dataflow order."""
    rows = trace.query(_QUERY, [comparison]).to_pylist()
    failing = [row["module"] for row in rows]
    return tuple(
        Injecting(
            row["module"],
            row["target_site"],
            tuple(sorted(row["phases"], reverse=True)),
            row["r_local"],
            tuple(sorted(inputs[row["module"]].computed.code)),
            tuple(sorted(inputs[row["module"]].computed.through)),
            tuple(module for module in failing if row["module"].startswith(f"{module}.")),
        )
        for row in rows
        if not any(module.startswith(f"{row['module']}.") for module in failing)
    )
