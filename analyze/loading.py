"""Where the tensors of a site are stored: from the catalog, whole over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..store.trace import Trace
from .ranks import Part, Stored, assemble
from .sites import Site

_FIELDS = """run, rank, prompt, phase, step, call, module, port, slot, dims, position_start, position_count, dtype,
    shape, nbytes, file_offset"""
_CHUNK_QUERY = f"""
SELECT {_FIELDS}, s.path
FROM tensors t JOIN shards s USING (run, rank, shard)
WHERE phase <> 'static' AND (run, module, port, slot, call) IN (
    SELECT w.run, w.module, w.port, w.slot, w.call
    FROM (SELECT unnest(?::STRUCT(run VARCHAR, module VARCHAR, port VARCHAR, slot VARCHAR, call INTEGER)[]) AS w))
ORDER BY run, prompt, step, phase DESC, rank, seq
"""  # noqa: S608 (fixed names)


def load_sites(trace: Trace, wanted: Iterable[tuple[str, Site]]) -> dict[tuple[str, Site], list[Stored]]:
    """The tensors of some sites of some runs, whole over all ranks, in the order in which positions were computed.

    Raises:
        InputError: the dims of a tensor do not allow its ranks to be put together.
    """
    keys = [
        {"run": run, "module": site.module, "port": site.port, "slot": site.slot, "call": site.call}
        for run, site in wanted
    ]
    found: dict[tuple[str, Site], list[Stored]] = {}
    for row in trace.query(_CHUNK_QUERY, [keys]).to_pylist():
        site = Site(row["module"], row["port"], row["slot"], row["call"])
        found.setdefault((row["run"], site), []).append(_stored(row))
    tp = {run: trace.manifest(run).tp for run in {run for run, _ in found}}
    whole: dict[tuple[str, Site], list[Stored]] = {}
    for (run, site), tensors in found.items():
        whole[run, site] = assemble(tensors, tp[run], f"run {run!r}, site {site.name}")
    return whole


def _stored(row: Mapping[str, Any]) -> Stored:
    part = Part(row["rank"], row["dtype"], tuple(row["shape"]), row["nbytes"], row["file_offset"], row["path"])
    return Stored(
        -1 if row["prompt"] is None else row["prompt"],
        row["phase"],
        row["step"],
        row["dims"],
        row["position_start"],
        row["position_count"],
        (part,),
    )
