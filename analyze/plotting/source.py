"""What a picture is drawn from: a comparison with its runs, and its sites."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...store.errors import InputError, TraceNotFoundError
from ...store.trace import Trace

_PHASES = ("encode", "prefill", "decode", "forward")
#: Names listed in an error message before it says how many more there are.
_LISTED = 6


@dataclass(frozen=True)
class Compared:
    """A comparison.

    Attributes:
        name: its name.
        reference, baseline, target: the runs, as `name (dtype)`; baseline is None in a comparison of two runs.
        quantity: what its sites are judged by, `R` or `relative L2`.
        limit: largest value of that quantity that passes, ratio.
        verdict: pass, fail or undecided.
    """

    name: str
    reference: str
    baseline: str | None
    target: str
    quantity: str
    limit: float
    verdict: str

    @property
    def headline(self) -> str:
        """What is compared with what, in one line."""
        measure = f"R = error over that of {self.baseline}" if self.baseline else "relative L2 error"
        return f"{self.target} against {self.reference}: {measure}"


@dataclass(frozen=True)
class SiteResult:
    """One site in one phase, over all prompts.

    Attributes:
        measurement: key of its quantiles.
        site, module, phase: where it is in the reference.
        target_site: what it was compared with; a site may be compared with several, then it has several results.
        value: R, or relative L2 without a baseline; infinite: only the baseline is exact; None: undefined.
        low, high: 95 % interval of R, or None.
        state, verdict: as in `measurements`.
    """

    measurement: int
    site: str
    target_site: str
    module: str
    phase: str
    value: float | None
    low: float | None
    high: float | None
    state: str
    verdict: str


def compared(trace: Trace, name: str | None = None) -> Compared:
    """A comparison of a trace; the only one if no name is given.

    Raises:
        TraceNotFoundError: the trace has no comparison, or none of that name.
        InputError: it has several and no name was given.
    """
    rows = trace.query(
        """SELECT c.*, r.dtype AS reference_dtype, b.dtype AS baseline_dtype, t.dtype AS target_dtype
           FROM comparisons c LEFT JOIN runs r ON r.run = c.reference LEFT JOIN runs b ON b.run = c.baseline
           LEFT JOIN runs t ON t.run = c.target ORDER BY c.created_at, c.comparison"""
    ).to_pylist()
    if not rows:
        raise TraceNotFoundError(f"{trace.path} has no comparison; make one with 'sleuth compare {trace.path}'")
    known = listing(row["comparison"] for row in rows)
    if name is None and len(rows) > 1:
        raise InputError(f"{trace.path} has {len(rows)} comparisons; name one of {known}")
    found = [row for row in rows if name in (None, row["comparison"])]
    if not found:
        raise TraceNotFoundError(f"{trace.path} has no comparison {name!r}; its comparisons: {known}")
    return _compared(found[0])


def _compared(row: dict[str, Any]) -> Compared:
    thresholds = json.loads(row["thresholds"])
    judged_by = ("R", "tau_r") if row["baseline"] is not None else ("relative L2", "relative_l2")
    return Compared(
        row["comparison"],
        _run(row, "reference"),
        None if row["baseline"] is None else _run(row, "baseline"),
        _run(row, "target"),
        judged_by[0],
        float(thresholds[judged_by[1]]),
        row["verdict"],
    )


def _run(row: dict[str, Any], role: str) -> str:
    dtype = row[f"{role}_dtype"]
    return f"{row[role]} ({dtype})" if dtype else str(row[role])


def site_results(trace: Trace, comparison: Compared, phase: str | None = None) -> dict[str, list[SiteResult]]:
    """The sites of a comparison by phase, in dataflow order.

    Raises:
        InputError: nothing was measured, or nothing in that phase.
    """
    value = "r_ratio" if comparison.baseline is not None else "relative_l2"
    rows = trace.query(
        f"""SELECT measurement, site, target_site, module, phase, nullif({value}, 'NaN'::DOUBLE) AS value,
                   nullif(r_low, 'NaN'::DOUBLE) AS low, nullif(r_high, 'NaN'::DOUBLE) AS high, state, verdict
            FROM measurements WHERE comparison = ? AND prompt IS NULL ORDER BY exec_order, measurement""",  # noqa: S608
        [comparison.name],
    ).to_pylist()
    by_phase: dict[str, list[SiteResult]] = {}
    for row in rows:
        by_phase.setdefault(row["phase"], []).append(SiteResult(**row))
    if not by_phase:
        raise InputError(f"comparison {comparison.name!r} measured no site: there is nothing to draw")
    if phase is not None and phase not in by_phase:
        raise InputError(
            f"comparison {comparison.name!r} has no phase {phase!r}; its phases: {listing(sorted_phases(by_phase))}"
        )
    return {name: by_phase[name] for name in sorted_phases(by_phase) if phase in (None, name)}


def sorted_phases(phases: Iterable[str]) -> list[str]:
    """Phases in the order in which they run: prefill, decode, forward, anything else."""
    return sorted(phases, key=lambda name: (_PHASES.index(name) if name in _PHASES else len(_PHASES), name))


def choose_site(
    results: dict[str, list[SiteResult]], comparison: Compared, name: str | None = None, phase: str | None = None
) -> SiteResult:
    """The site of that name, in that phase: of all that fit, the one with the largest finite value.

    Raises:
        InputError: none fits; the message names phases or sites that do.
    """
    if phase is not None and phase not in results:
        raise InputError(f"comparison {comparison.name!r} has no phase {phase!r}; its phases: {listing(results)}")
    named = [result for sites in results.values() for result in sites if name in (None, result.site)]
    if not named:
        raise InputError(f"comparison {comparison.name!r} measured no site {name!r}; it has {_similar(results, name)}")
    fitting = [result for result in named if phase in (None, result.phase)]
    if not fitting:
        phases = listing(result.phase for result in named)
        raise InputError(f"comparison {comparison.name!r} measured {name!r} in {phases} only, not in {phase}")
    return largest(fitting) or fitting[0]


def _similar(results: dict[str, list[SiteResult]], name: str | None) -> str:
    names = list(dict.fromkeys(result.site for sites in results.values() for result in sites))
    return listing(difflib.get_close_matches(name or "", names, n=_LISTED, cutoff=0.5) or names)


def first_failure(sites: Sequence[SiteResult]) -> SiteResult | None:
    """The earliest failing site of a phase."""
    return next((site for site in sites if site.verdict == "fail"), None)


def largest(sites: Iterable[SiteResult]) -> SiteResult | None:
    """The site with the largest finite value."""
    finite = [site for site in sites if site.value is not None and math.isfinite(site.value)]
    return max(finite, key=lambda site: site.value or 0.0, default=None)


def listing(names: Iterable[str]) -> str:
    """Names for an error message, the first few."""
    items: Sequence[str] = list(names)
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
