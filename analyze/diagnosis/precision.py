"""Sites that are more exact than the baseline: noteworthy, and no fault by themselves."""

from __future__ import annotations

from .causes import entry_of
from .finding import Finding
from .runs import ComparedRuns

#: R below which, with its whole interval, the baseline's rounding cannot be all that happens.
_FAR_BELOW = 0.7
_FIRST = """
SELECT site, target_site, phase, r_ratio, r_low, r_high, count(*) OVER () AS n FROM measurements
WHERE comparison = ? AND prompt IS NULL AND state = 'measured' AND r_high < ?
ORDER BY phase_order(phase), exec_order, measurement LIMIT 1
"""


def over_precise(runs: ComparedRuns, rank: int) -> list[Finding]:
    """The first site whose error is well below the baseline's, if any; the others may inherit it."""
    from ..sql_library import run_sql

    rows = run_sql(runs.trace, _FIRST, [runs.comparison, _FAR_BELOW]).to_pylist()
    return [
        Finding(
            rank,
            row["site"],
            row["target_site"],
            row["phase"],
            "over_precision",
            1.0,
            f"R is {row['r_ratio']:.3g}: the target is more exact than the baseline here first, and at {row['n'] - 1}"
            " sites after it",
            "harmless, unless every bit has to match: look for an extra .float() or a wider dtype",
            entry_of("over_precision"),
            {"r_ratio": row["r_ratio"], "r_low": row["r_low"], "r_high": row["r_high"], "n_sites": row["n"]},
            f"sleuth plot layers {runs.trace.path} {runs.comparison}",
        )
        for row in rows
    ]
