"""Sites of a run: the named places where it recorded values, in dataflow order."""

from __future__ import annotations

from dataclasses import dataclass

from ..store.trace import Trace, site_name


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
    """What the catalog knows of a site.

    Attributes:
        site: the site.
        exec_order: earliest position in execution order.
        features: elements per token position (per tensor for sites without positions), None when it varies.
        positioned: whether its tensors cover token positions.
        phases: phases in which it was recorded.
        content: checksums of its tensors over prompts and steps; equal content means equal values throughout.
        n_tensors: number of its tensors.
        n_statistics_only: those without stored values.
    """

    site: Site
    exec_order: int
    features: int | None
    positioned: bool
    phases: tuple[str, ...]
    content: str
    n_tensors: int
    n_statistics_only: int


_QUERY = """
SELECT module, port, slot, call,
       min(exec_order) AS exec_order,
       min(elements // greatest(coalesce(position_count, 1), 1)) AS low,
       max(elements // greatest(coalesce(position_count, 1), 1)) AS high,
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
    """
    trace.manifest(run)
    return [
        SiteInfo(
            Site(row["module"], row["port"], row["slot"], row["call"]),
            row["exec_order"],
            row["low"] if row["low"] == row["high"] else None,
            row["positioned"],
            tuple(row["phases"]),
            row["content"],
            row["n_tensors"],
            row["n_statistics_only"],
        )
        for row in trace.query(_QUERY, [run]).to_pylist()
    ]
