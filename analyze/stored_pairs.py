"""A pair of sites of a stored comparison, aligned again: for whoever needs its values and not only its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..store.errors import InputError
from ..store.trace import Trace
from .align import AlignedSite, Selection, align, match_prompts
from .loading import load_sites
from .ranks import Columns
from .sites import Site


def selection_of(transform_spec: str | None) -> Selection:
    """The features that a pair compares, from `mapping_entries.transform_spec`."""
    spec = json.loads(transform_spec) if transform_spec else {}
    if "start" in spec:
        return Selection(None, ((spec["start"], spec["stop"]),))
    return Selection(_columns(spec, "reference"), _columns(spec, "target"), spec.get("expert"))


def aligned_pair(trace: Trace, comparison: str, site: str, target_site: str) -> Mapping[str, Mapping[int, AlignedSite]]:
    """The values of one pair: for each phase of the target, for each prompt of the reference.

    Raises:
        InputError: the comparison does not pair these sites.
    """
    rows = trace.query(
        """SELECT c.reference, c.baseline, c.target, e.transform_spec FROM comparisons c JOIN mapping_entries e
           ON e.mapping = c.mapping AND e.reference_sites = [?] AND e.target_sites = [?] WHERE c.comparison = ?""",
        [site, target_site, comparison],
    ).to_pylist()
    if not rows:
        raise InputError(f"comparison {comparison!r} does not pair {site} with {target_site}")
    row = rows[0]
    places = {"reference": _site(trace, row["reference"], site), "target": _site(trace, row["target"], target_site)}
    wanted = [(row["reference"], places["reference"]), (row["target"], places["target"])]
    if row["baseline"] is not None:
        wanted.append((row["baseline"], places["reference"]))
    stored = load_sites(trace, wanted)
    baseline = stored.get(wanted[2], []) if row["baseline"] is not None else None
    prompts = match_prompts(trace, row["reference"], row["baseline"], row["target"])
    tensors = (stored.get(wanted[0], []), baseline, stored.get(wanted[1], []))
    return align(trace, tensors, prompts, selection_of(row["transform_spec"]))


def _columns(spec: Mapping[str, list[list[int]]], side: str) -> Columns | None:
    ranges = spec.get(side)
    return None if ranges is None else tuple((first, last) for first, last in ranges)


def _site(trace: Trace, run: str, name: str) -> Site:
    rows = trace.query(
        "SELECT DISTINCT module, port, slot, call FROM tensors WHERE run = ? AND phase <> 'static'", [run]
    ).to_pylist()
    for row in rows:
        site = Site(row["module"], row["port"], row["slot"], row["call"])
        if site.name == name:
            return site
    raise InputError(f"run {run!r} has no site {name!r}")
