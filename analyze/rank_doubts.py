"""Doubts about the ranks of a run: copies that differ, and shards that are copies."""

from __future__ import annotations

from collections.abc import Sequence

from ..store.trace import Trace
from .ranks import layout_of
from .sites import Site

# One row per site, dims and rank: how many of its tensors there are that differ from the lowest rank's, and from the
# lowest rank's that should hold the same part; `telling` leaves out tensors that are constant on the lowest rank.
_QUERY = r"""
WITH numbered AS (
    SELECT *, coalesce(try_cast(nullif(regexp_extract(dims, '\[tp/(\d+)\]', 1), '') AS INTEGER), 1) AS copies
    FROM tensors WHERE run = ? AND phase <> 'static' AND dims <> ''
), compared AS (
    SELECT module, port, slot, call, dims, rank,
           checksum <> first(checksum) OVER everyone AS differs,
           checksum <> first(checksum) OVER same AS differs_from_copy,
           coalesce(first(min < max) OVER everyone, false) AS telling
    FROM numbered
    WINDOW everyone AS (PARTITION BY module, port, slot, call, dims, prompt, phase, step, position_start
                        ORDER BY rank, seq),
           same AS (PARTITION BY module, port, slot, call, dims, prompt, phase, step, position_start, rank // copies
                    ORDER BY rank, seq)
)
SELECT module, port, slot, call, dims, rank, count_if(differs) AS n_differ,
       count_if(differs_from_copy) AS n_differ_from_copy, count_if(telling) AS n_telling,
       count_if(telling AND differs) AS n_telling_differ
FROM compared GROUP BY ALL ORDER BY rank
"""


def doubts_about_ranks(trace: Trace, run: str, sites: Sequence[Site]) -> list[str]:
    """One line per kind of doubt, naming the first site in dataflow order.

    Tensors that every rank should hold alike must be equal bit for bit. Shards of one tensor must not all be equal,
    step after step: then a rank was given the weights of another. Constant tensors say nothing about the latter.

    Args:
        trace: the trace.
        run: the run to check.
        sites: its sites that were compared, in dataflow order.
    """
    if trace.manifest(run).tp < 2:
        return []
    order = {site: place for place, site in reversed(list(enumerate(sites)))}
    differing: dict[Site, int] = {}
    repeated: dict[Site, int] = {}
    for row in trace.query(_QUERY, [run]).to_pylist():
        site, layout = Site(row["module"], row["port"], row["slot"], row["call"]), layout_of(row["dims"])
        if site not in order or layout.partial:
            continue
        if (layout.axis is None and row["n_differ"]) or (layout.copies > 1 and row["n_differ_from_copy"]):
            differing.setdefault(site, row["rank"])
        telling = layout.by_features and row["rank"] >= layout.copies and row["n_telling"]
        if telling and not row["n_telling_differ"]:
            repeated.setdefault(site, row["rank"])
    doubts = []
    if differing:
        site = min(differing, key=order.__getitem__)
        doubts.append(
            f"rank {differing[site]} of run {run!r} holds other values than its copies at {site.name}"
            f"{_and_more(len(differing))}: a reduction is missing, or ranks are out of step"
        )
    if repeated:
        site = min(repeated, key=order.__getitem__)
        doubts.append(
            f"rank {repeated[site]} holds rank 0's shard of {site.name}{_and_more(len(repeated))} in run {run!r}"
        )
    return doubts


def _and_more(n: int) -> str:
    return f" (and {n - 1} more sites)" if n > 1 else ""
