"""Localization as a whole: suspects and change points of a comparison, kept in the catalog."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import pyarrow as pa

from ...store import catalog
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..verdict import FAIL, PASS, UNDECIDED
from .candidates import candidates
from .changes import SiteChange, site_changes
from .replays import replays_of
from .site_errors import site_errors
from .suspects import Suspect, open_suspects, rank


@dataclass(frozen=True)
class Localization:
    """Where a comparison's error comes from.

    Attributes:
        comparison: its name.
        verdict: `fail` when there are suspects; `pass` when there are none and the comparison passes; else
            `undecided`: what was not compared, or could not be judged, may hide an origin.
        suspects: by rank.
        open: sites before the first failing one whose R is beyond what is tolerated though noise may explain it, see
            `suspects.open_suspects`.
        changes: change points of R, phases in time order and sites in dataflow order.
    """

    comparison: str
    verdict: str
    suspects: tuple[Suspect, ...]
    open: tuple[Suspect, ...]
    changes: tuple[SiteChange, ...]


def localize(trace: Trace, comparison: str, *, progress: Progress = no_progress) -> Localization:
    """Rank the suspects of a comparison, find the change points of R, and keep both in the catalog.

    Raises:
        InputError: there is no such comparison.
        CatalogLockedError: another process holds the catalog.
    """
    progress("reading measurements")
    phases = site_errors(trace, comparison)
    changes = {}
    for number, (phase, sites) in enumerate(phases.items()):
        progress(f"change points in {phase}", number, len(phases))
        changes[phase] = site_changes(sites)
    progress("ranking")
    ranked = rank(candidates(phases, replays_of(trace, comparison)), phases, changes)
    overall = trace.query("SELECT verdict FROM comparisons WHERE comparison = ?", [comparison]).to_pylist()[0]
    verdict = FAIL if ranked else PASS if overall["verdict"] == PASS else UNDECIDED
    every = tuple(one for some in changes.values() for one in some)
    found = Localization(comparison, verdict, tuple(ranked), tuple(open_suspects(trace, comparison)), every)
    _store(trace, found)
    return found


def _store(trace: Trace, found: Localization) -> None:
    with catalog.writing(trace.catalog_path) as connection:
        for table, kind, rows in (
            ("suspects", Suspect, found.suspects),
            ("change_points", SiteChange, found.changes),
        ):
            connection.execute(f"DELETE FROM {table} WHERE comparison = ?", [found.comparison])  # noqa: S608 (fixed)
            records = [asdict(row) for row in rows]
            columns = {field.name: [record[field.name] for record in records] for field in fields(kind)}
            catalog.insert(connection, table, pa.table({"comparison": [found.comparison] * len(rows), **columns}))
