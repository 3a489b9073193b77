"""Sites whose tensors depend on how prompts were batched, and can be compared only between runs that batched alike.

Two kinds: tensors without token positions from a forward pass over several prompts (the rows that an expert was given,
positions counted in columns), and tensors that are as wide as the padded batch (attention masks). Attention weights
hold the keys of their own prompt only (`b n s k`), and do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..store.trace import Trace
from .pairs import Gap, SiteMapping
from .sites import Site, SiteInfo

REASON = "it depends on how prompts are batched and padded, which differs between the runs"

_FORWARDS = """
SELECT phase, step, max(n) AS forwards
FROM (
    SELECT phase, step, count(*) AS n FROM tensors
    WHERE run = ? AND prompt IS NULL AND phase <> 'static' GROUP BY phase, step, module, port, slot, call
)
GROUP BY phase, step ORDER BY phase, step
"""
_WHOLE_BATCH = """
SELECT DISTINCT module, port, slot, call FROM tensors WHERE run = ? AND prompt IS NULL AND phase <> 'static'
"""
_BY_KEY = """
SELECT module, port, slot, call FROM tensors WHERE run = ? AND phase <> 'static'
GROUP BY ALL HAVING bool_and(position_start IS NOT NULL AND dims LIKE 'b n% s k')
"""


def without_batch_sites(
    trace: Trace,
    mapping: SiteMapping,
    runs: tuple[str, str | None, str],
    reference: Sequence[SiteInfo],
    target: Sequence[SiteInfo],
) -> SiteMapping:
    """Account for the pairs whose tensors follow the batch, where runs batched differently.

    Args:
        trace: the trace.
        mapping: of the reference and the target.
        runs: names of the reference, of the baseline (or None) and of the target.
        reference: sites of the reference.
        target: sites of the target.
    """
    if _batched_alike(trace, [run for run in runs if run is not None]):
        return mapping
    following = _following(trace, runs[0], reference), _following(trace, runs[2], target)
    dropped = [pair for pair in mapping.pairs if pair.reference in following[0] or pair.target in following[1]]
    gaps = dict.fromkeys(Gap(pair.reference, "skipped", REASON) for pair in dropped)
    kept = tuple(pair for pair in mapping.pairs if pair not in dropped)
    return replace(mapping, pairs=kept, gaps=(*mapping.gaps, *gaps))


def _batched_alike(trace: Trace, runs: Sequence[str]) -> bool:
    """Whether runs made as many forward passes over several prompts in every step, and say nothing else themselves."""
    forwards = [trace.query(_FORWARDS, [run]).to_pylist() for run in runs]
    said = [trace.manifest(run).provenance.get("generation") or {} for run in runs]
    differs = any(len({facts[name] for facts in said if name in facts}) > 1 for name in ("padding", "batch_size"))
    return not differs and all(rows == forwards[0] for rows in forwards)


def _following(trace: Trace, run: str, infos: Sequence[SiteInfo]) -> set[Site]:
    """Sites of a run that hold rows of whole batches in no known order, or whose width varies from batch to batch."""
    positioned = {info.site for info in infos if info.positioned}
    whole, by_key = (
        {Site(row["module"], row["port"], row["slot"], row["call"]) for row in trace.query(query, [run]).to_pylist()}
        for query in (_WHOLE_BATCH, _BY_KEY)
    )
    return (whole - positioned) | {info.site for info in infos if info.features is None and info.site not in by_key}
