"""A stored comparison as replay needs it: its runs, its thresholds and the pairs of sites that it compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...analyze.pairs import Pair
from ...analyze.sites import SiteInfo, sites_of
from ...analyze.stored_pairs import selection_of
from ...analyze.verdict import Thresholds
from ...store.errors import InputError, TraceNotFoundError
from ...store.trace import Trace


@dataclass(frozen=True)
class Compared:
    """A comparison, read back from the catalog.

    Attributes:
        name: its name.
        reference, baseline, target: its runs.
        thresholds: its limits.
        origin: `auto`, or the mapping file that it used.
        pairs: the sites that were compared.
        gaps: name, status and reason of the reference's sites that were not.
        reference_sites: all sites of the reference.
        target_sites: all sites of the target.
    """

    name: str
    reference: str
    baseline: str | None
    target: str
    thresholds: Thresholds
    origin: str
    pairs: tuple[Pair, ...]
    gaps: tuple[tuple[str, str, str], ...]
    reference_sites: tuple[SiteInfo, ...]
    target_sites: tuple[SiteInfo, ...]


def read_comparison(trace: Trace, name: str) -> Compared:
    """Read a comparison.

    Raises:
        TraceNotFoundError: there is none of this name.
        InputError: its runs are not those that it was made from.
    """
    rows = trace.query(
        "SELECT * FROM comparisons JOIN mappings USING (mapping) WHERE comparison = ?", [name]
    ).to_pylist()
    if not rows:
        known = [row["comparison"] for row in trace.query("SELECT comparison FROM comparisons ORDER BY 1").to_pylist()]
        listed = ", ".join(known) or "none; make one with 'sleuth compare'"
        raise TraceNotFoundError(f"{trace.path} has no comparison {name!r}; its comparisons: {listed}")
    row = rows[0]
    sites = {run: tuple(sites_of(trace, row[run])) for run in ("reference", "target")}
    known_limits = {field.name for field in fields(Thresholds)}
    limits = {key: value for key, value in json.loads(row["thresholds"]).items() if key in known_limits}
    return Compared(
        name,
        row["reference"],
        row["baseline"],
        row["target"],
        Thresholds(**limits),
        row["origin"],
        tuple(_pairs(trace, name, sites["reference"], sites["target"])),
        tuple(_gaps(trace, name)),
        sites["reference"],
        sites["target"],
    )


def _pairs(trace: Trace, name: str, reference: Sequence[SiteInfo], target: Sequence[SiteInfo]) -> list[Pair]:
    by_name = [{info.site.name: info.site for info in infos} for infos in (reference, target)]
    pairs = []
    statement = "SELECT * FROM mapping_entries WHERE mapping = ? ORDER BY entry"
    for row in trace.query(statement, [name]).to_pylist():
        names = row["reference_sites"][0], row["target_sites"][0]
        if names[0] not in by_name[0] or names[1] not in by_name[1]:
            raise InputError(f"comparison {name!r} names sites that its runs do not have; run 'sleuth compare' again")
        chosen = selection_of(row["transform_spec"])
        sites = by_name[0][names[0]], by_name[1][names[1]]
        pairs.append(Pair(*sites, chosen.target, row["score"], row["reason"], chosen.reference))
    return pairs


def _gaps(trace: Trace, name: str) -> list[tuple[str, str, str]]:
    statement = (
        "SELECT site, status, reason FROM coverage WHERE comparison = ? AND status <> 'matched' ORDER BY exec_order"
    )
    return [(row["site"], row["status"], row["reason"]) for row in trace.query(statement, [name]).to_pylist()]
