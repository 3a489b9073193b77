"""The coverage ledger of a replay: every site of the original comparison was replayed, or the reason is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...analyze.compare import ComparisonSummary
from ...analyze.sites import Site
from ...analyze.verdict import FAIL, UNDECIDED
from ...store import catalog
from ...store.trace import Trace
from .compared import Compared
from .recorder import Inputs

UNMATCHED, SKIPPED = "unmatched", "skipped"


@dataclass(frozen=True)
class LeftOut:
    """A site of the reference that was not replayed.

    Attributes:
        site: its name.
        exec_order: its place in execution order.
        status: `unmatched` (a hole) or `skipped` (accounted for).
        reason: why.
    """

    site: str
    exec_order: int
    status: str
    reason: str


def left_out(
    compared: Compared, wanted: Collection[Site], inputs: Mapping[str, Inputs], modules: Sequence[str]
) -> list[LeftOut]:
    """Sites of the original comparison that have no replay, with the reason."""
    gaps = {name: (status, reason) for name, status, reason in compared.gaps}
    paired = {pair.reference for pair in compared.pairs}
    found = []
    for info in compared.reference_sites:
        site = info.site
        if site in wanted and site.module in inputs and not inputs[site.module].trouble:
            continue
        if site.name in gaps:
            status, reason = gaps[site.name]
        elif modules and not any(fnmatchcase(site.module, glob) for glob in modules):
            status, reason = SKIPPED, "not among the modules the user asked for"
        elif site.port != "output":
            status, reason = SKIPPED, "an input: it is what a replay starts from"
        elif site in wanted:
            trouble = inputs[site.module].trouble if site.module in inputs else "the module was not called"
            status, reason = SKIPPED if trouble.startswith("its input is tokens") else UNMATCHED, trouble
        elif site in paired:
            status, reason = SKIPPED, "its size depends on how positions were divided into steps"
        else:
            status, reason = UNMATCHED, "the comparison did not pair it"
        found.append(LeftOut(site.name, info.exec_order, status, reason))
    return found


def enter_ledger(trace: Trace, summary: ComparisonSummary, missing: Sequence[LeftOut]) -> tuple[str, tuple[str, ...]]:
    """Add what was left out to the coverage of a replay's comparison.

    Returns:
        The verdict and its reasons: holes leave open what would have passed.
    """
    holes = [item for item in missing if item.status == UNMATCHED]
    verdict, reasons = summary.verdict, list(summary.reasons)
    if holes:
        reasons.append(f"{len(holes)} sites could not be replayed, for example {holes[0].site}: {holes[0].reason}")
        verdict = verdict if verdict == FAIL else UNDECIDED
    columns = {
        "comparison": [summary.comparison] * len(missing),
        "site": [item.site for item in missing],
        "phase": [""] * len(missing),
        "exec_order": [item.exec_order for item in missing],
        "status": [item.status for item in missing],
        "reason": [item.reason for item in missing],
    }
    with catalog.writing(trace.catalog_path) as connection:
        catalog.insert(connection, "coverage", columns)
        connection.execute(
            """UPDATE comparisons SET verdict = ?, reasons = ?, n_unmatched = n_unmatched + ?, n_skipped = n_skipped + ?
               WHERE comparison = ?""",
            [verdict, reasons, len(holes), len(missing) - len(holes), summary.comparison],
        )
    return verdict, tuple(reasons)
