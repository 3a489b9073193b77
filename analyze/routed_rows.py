"""Sites whose rows are the tokens that a router sent there: experts that are modules of their own.

Such a tensor holds as many rows as the router chose to send, in an order that is the implementation's own, padding
included; which token a row belongs to is nowhere recorded. One exchanged token shifts all rows behind it. Two runs
therefore cannot be compared there, even where their tensors happen to have equal shapes. The router, the weights it
gives and the experts' block are compared token by token, and an expert that computes something else shows in the
latter.

They are recognised by what they recorded, not by names: siblings (modules whose paths differ in their last number) are
called with other numbers of rows in the same forward pass, or some are called and earlier ones are not.
"""

from __future__ import annotations

from dataclasses import replace

from ..store.trace import Trace
from .pairs import Gap, SiteMapping

REASON = (
    "its rows are the tokens that a router sent to it, in an unrecorded order; the router and the experts' block are "
    "compared instead"
)

# Where a run ended early, the last siblings of its last forward pass are missing: a set of callers that lacks only
# those tells nothing.
_ROUTED = r"""
WITH calls AS (
    SELECT regexp_replace(module, '^((?:.*\.)?)[0-9]+((?:\..*)?)$', '\1*\2') AS family,
           regexp_extract(module, '^(?:.*\.)?([0-9]+)(?:\..*)?$', 1)::BIGINT AS member,
           module, port, slot, call, phase, step, rank, prompt, position_start, shape
    FROM tensors WHERE run = ? AND phase <> 'static' AND regexp_matches(module, '(^|\.)[0-9]+(\.|$)')
), members AS (
    SELECT family, port, slot, call, phase, rank, list_sort(list(DISTINCT member)) AS everyone
    FROM calls GROUP BY ALL
), sizes AS (
    SELECT family, port, slot, call, phase, step, rank, prompt, member,
           list_sort(list(shape[1])) AS n_rows, min(shape[2:]) AS rest, max(shape[2:]) AS other_rest,
           bool_and(position_start IS NULL) AS free
    FROM calls GROUP BY ALL
), passes AS (
    SELECT family, port, slot, call, phase, step, rank, prompt, list_sort(list(member)) AS called,
           bool_and(free) AND count(DISTINCT n_rows) > 1 AND min(rest) = max(other_rest) AS uneven
    FROM sizes GROUP BY ALL
), routed AS (
    SELECT DISTINCT family FROM passes JOIN members USING (family, port, slot, call, phase, rank)
    WHERE uneven OR called <> everyone[1:len(called)]
)
SELECT DISTINCT module FROM calls SEMI JOIN routed USING (family)
"""


def without_routed_rows(trace: Trace, mapping: SiteMapping, runs: tuple[str, str | None, str]) -> SiteMapping:
    """Account for the pairs of which either side holds the rows of a router's choice.

    Args:
        trace: the trace.
        mapping: of the reference and the target.
        runs: names of the reference, of the baseline (or None) and of the target.
    """
    reference = routed_modules(trace, runs[0]) | (routed_modules(trace, runs[1]) if runs[1] is not None else set())
    target = routed_modules(trace, runs[2])
    dropped = {
        pair: None
        for pair in mapping.pairs
        if _inside(pair.reference.module, reference) or _inside(pair.target.module, target)
    }
    gaps = dict.fromkeys(Gap(pair.reference, "skipped", REASON) for pair in dropped)
    kept = tuple(pair for pair in mapping.pairs if pair not in dropped)
    return replace(mapping, pairs=kept, gaps=(*mapping.gaps, *gaps))


def routed_modules(trace: Trace, run: str) -> set[str]:
    """Modules of a run that were given the tokens of a router's choice; what they contain is not listed."""
    return {row["module"] for row in trace.query(_ROUTED, [run]).to_pylist()}


def _inside(module: str, routed: set[str]) -> bool:
    """Whether a module is one of these, or part of one."""
    if not routed:
        return False
    parts = module.split(".")
    return any(".".join(parts[:end]) in routed for end in range(1, len(parts) + 1))
