"""Where the tensors of a site are stored: from the catalog, whole over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter

from ..store.trace import Trace
from .ranks import Stored, assemble
from .routed_tokens import routed_block
from .sites import Site

#: Slot of the tap that holds the numbers of every token's experts; what they computed is in `experts_gate` and so on.
EXPERTS = "experts"
_FIELDS = """run, rank, seq, prompt, phase, step, call, module, port, slot, dims, position_start, position_count, dtype,
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

    Rows of experts that are modules of their own come by token where a run proves which token each row is
    (`routed_tokens`), else as they are.

    Raises:
        InputError: the dims of a tensor do not allow its ranks to be put together.
    """
    keys = [
        {"run": run, "module": site.module, "port": site.port, "slot": site.slot, "call": site.call}
        for run, site in wanted
    ]
    keys += [
        {**key, "slot": EXPERTS} for key in keys if key["port"] == "tap" and str(key["slot"]).startswith(f"{EXPERTS}_")
    ]
    found: dict[tuple[str, Site], list[tuple[int, Stored]]] = {}
    for row in trace.query(_CHUNK_QUERY, [keys]).to_pylist():
        site = Site(row["module"], row["port"], row["slot"], row["call"])
        found.setdefault((row["run"], site), []).append((row["seq"], Stored.of(row)))
    manifests = {run: trace.manifest(run) for run in {run for run, _ in found}}
    whole: dict[tuple[str, Site], list[Stored]] = {}
    for (run, site), tensors in found.items():
        block = routed_block(trace, manifests[run], site.module)
        whole[run, site] = block.placed(site, sorted(tensors, key=itemgetter(0))) if block else []
        if not whole[run, site]:
            origin = f"run {run!r}, site {site.name}"
            whole[run, site] = assemble([stored for _, stored in tensors], manifests[run].tp, origin)
    for (run, site), joined in whole.items():
        choices = whole.get((run, replace(site, slot=EXPERTS)))
        if choices and site.port == "tap" and site.slot.startswith(f"{EXPERTS}_"):
            whole[run, site] = _with_choices(joined, choices)
    return whole


def _with_choices(tensors: Iterable[Stored], choices: Iterable[Stored]) -> list[Stored]:
    """Tensors of every token's experts, with the tensor that tells which experts these are."""
    by_place = {(c.prompt, c.phase, c.step, c.position_start): c.parts[0] for c in choices}
    return [replace(t, chosen=by_place.get((t.prompt, t.phase, t.step, t.position_start))) for t in tensors]
