"""Sites of a run: the named places where it recorded values, in dataflow order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..store.trace import Trace, site_name
from .ranks import Layout, layout_of


@dataclass(frozen=True)
class Site:
    """One site of one run.

    Attributes:
        module: module path, empty for the root.
        port: `output` or `input`.
        slot: element of a tuple or field of a dataclass, or empty.
        call: how often the module had been called before within a step.
    """

    module: str
    port: str = "output"
    slot: str = ""
    call: int = 0

    @property
    def name(self) -> str:
        """How the site is written."""
        return site_name(self.module, self.port, self.slot, self.call)


@dataclass(frozen=True)
class SiteInfo:
    """What the catalog knows of a site; sizes are those of the global tensor, whatever its ranks hold.

    Attributes:
        site: the site.
        exec_order: earliest position in execution order.
        features: elements per token position (per tensor for sites without positions), None when it varies.
        positioned: whether its tensors cover token positions.
        phases: phases in which it was recorded.
        content: checksums of its tensors over prompts and steps; equal content means equal values throughout.
        n_tensors: number of its tensors.
        n_statistics_only: those without stored values.
        shards: distinct parts, one behind the other, that its features are made of.
        lacking: why the global tensor cannot be read, or empty.
    """

    site: Site
    exec_order: int
    features: int | None
    positioned: bool
    phases: tuple[str, ...]
    content: str
    n_tensors: int
    n_statistics_only: int
    shards: int = 1
    lacking: str = ""


_QUERY = """
SELECT module, port, slot, call,
       min(exec_order) AS exec_order,
       list(DISTINCT {dims: dims, rank: rank, width: elements // greatest(coalesce(position_count, 1), 1)}) AS parts,
       bool_and(position_start IS NOT NULL) AS positioned,
       list_sort(list(DISTINCT phase)) AS phases,
       md5(string_agg(checksum, ',' ORDER BY prompt, phase, step, rank)) AS content,
       count(*) AS n_tensors,
       count(*) FILTER (dataset = '') AS n_statistics_only
FROM (SELECT *, list_product(shape)::BIGINT AS elements FROM tensors WHERE run = ? AND phase <> 'static')
GROUP BY ALL ORDER BY exec_order, module, port, slot, call
"""


def sites_of(trace: Trace, run: str) -> list[SiteInfo]:
    """All sites of a run but parameters and buffers, in execution order.

    Raises:
        TraceNotFoundError: the trace has no such run.
        InputError: the dims of a tensor cannot be understood.
    """
    tp = trace.manifest(run).tp
    return [_info(row, tp) for row in trace.query(_QUERY, [run]).to_pylist()]


def _info(row: Mapping[str, Any], tp: int) -> SiteInfo:
    features, shards, lacking = _global_size(row["parts"], tp)
    return SiteInfo(
        Site(row["module"], row["port"], row["slot"], row["call"]),
        row["exec_order"],
        features,
        row["positioned"],
        tuple(row["phases"]),
        row["content"],
        row["n_tensors"],
        row["n_statistics_only"],
        shards,
        lacking,
    )


def _global_size(parts: Iterable[Mapping[str, Any]], tp: int) -> tuple[int | None, int, str]:
    """Features of the global tensor, the parts they come in, and why it cannot be put together.

    Args:
        parts: `dims`, `rank` and `width` (elements per position) of the tensors of a site, without repetition.
        tp: number of ranks of the run.
    """
    by_dims: dict[str, dict[int, set[int]]] = {}
    for part in parts:
        by_dims.setdefault(part["dims"], {}).setdefault(part["rank"], set()).add(part["width"])
    sizes: set[int | None] = set()
    shards, lacking = 1, ""
    for dims, widths in by_dims.items():
        layout = layout_of(dims)
        ranks = range(0, tp, layout.copies) if layout.by_features else [min(widths)]
        if missing := [rank for rank in _needed(layout, tp) if rank not in widths]:
            lacking = f"rank {missing[0]} of {tp} did not record its part of it"
            continue
        varies = any(len(widths[rank]) > 1 for rank in ranks)
        sizes.add(None if varies else sum(next(iter(widths[rank])) for rank in ranks))
        shards = max(shards, len(ranks))
    return (sizes.pop() if len(sizes) == 1 else None), shards, lacking


def _needed(layout: Layout, tp: int) -> range:
    """Ranks without which a tensor of this layout is incomplete; position ranges may be empty on some ranks."""
    if layout.by_features or layout.partial:
        return range(0, tp, layout.copies)
    return range(0)
