"""What of the reference was compared, how, and what was not: the coverage and mapping rows of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..store import catalog
from .pairs import Gap, Pair, SiteMapping
from .sites import Site


@dataclass(frozen=True)
class Covered:
    """A pair and how much of it could be compared; `n_elsewhere` tokens only the reference sent to this expert."""

    pair: Pair
    phases: tuple[str, ...]
    n_compared: int
    n_expected: int
    n_elsewhere: int = 0


@dataclass(frozen=True)
class CoverageReport:
    """Coverage of a comparison.

    Attributes:
        mapping: the mapping it used.
        matched: pairs that shared something.
        gaps: reference sites that were not compared.
        order: place of every reference site in execution order.
    """

    mapping: SiteMapping
    matched: tuple[Covered, ...]
    gaps: tuple[Gap, ...]
    order: Mapping[Site, int]

    @classmethod
    def of(cls, covered: Sequence[Covered], mapping: SiteMapping, order: Mapping[Site, int]) -> CoverageReport:
        """Turn sites of which nothing was compared into holes."""
        matched = tuple(item for item in covered if item.n_compared > 0)
        paired = {item.pair.reference for item in matched}
        empty = {item.pair.reference: item for item in reversed(covered) if item.pair.reference not in paired}
        holes = [
            Gap(site, "unmatched", f"{item.pair.target.name} shares no prompt and position with it")
            for site, item in empty.items()
        ]
        return cls(mapping, matched, (*mapping.gaps, *holes), order)

    @property
    def n_matched(self) -> int:
        """Reference sites that were compared."""
        return len({item.pair.reference for item in self.matched})

    @property
    def unmatched(self) -> list[Gap]:
        """Reference sites that should have been compared."""
        return [gap for gap in self.gaps if gap.status == "unmatched"]


def doubts_about_coverage(report: CoverageReport) -> list[str]:
    """Doubts about which sites were compared, and at which positions.

    Heads that compute the last token only are exempt from the latter.
    """
    compared = {item.pair.reference for item in report.matched}
    doubts = [f"{note.site.name} is {note.reason}" for note in report.mapping.ambiguous if note.site in compared]
    partial = [
        item
        for item in report.matched
        if item.n_compared < item.n_expected and item.pair.reference.module.rpartition(".")[2] not in ("", "lm_head")
    ]
    if partial:
        worst = min(partial, key=lambda item: item.n_compared / item.n_expected)
        doubts.append(
            f"{len(partial)} sites were compared at only some positions, for example {worst.pair.reference.name} at "
            f"{worst.n_compared} of {worst.n_expected}"
        )
    return doubts


def store_coverage(connection: Any, comparison: str, report: CoverageReport) -> None:
    """Enter the pairs and the coverage into the catalog."""
    pairs = [item.pair for item in report.matched]
    catalog.insert(
        connection,
        "mapping_entries",
        {
            "mapping": [comparison] * len(pairs),
            "entry": list(range(len(pairs))),
            "reference_sites": [[pair.reference.name] for pair in pairs],
            "target_sites": [[pair.target.name] for pair in pairs],
            "transform": [pair.transform for pair in pairs],
            "transform_spec": [
                None if pair.transform_spec is None else json.dumps(pair.transform_spec) for pair in pairs
            ],
            "score": [pair.score for pair in pairs],
            "reason": [pair.reason for pair in pairs],
        },
    )
    rows = _matched_rows(report)
    rows += [(gap.site.name, "", report.order[gap.site], gap.status, gap.reason) for gap in report.gaps]
    catalog.insert(
        connection,
        "coverage",
        {
            "comparison": [comparison] * len(rows),
            **{
                column: [row[index] for row in rows]
                for index, column in enumerate(("site", "phase", "exec_order", "status", "reason"))
            },
        },
    )


def _matched_rows(report: CoverageReport) -> list[tuple[str, str, int, str, str]]:
    by_site: dict[Site, list[Covered]] = {}
    for item in report.matched:
        by_site.setdefault(item.pair.reference, []).append(item)
    return [
        (site.name, ",".join(items[0].phases), report.order[site], "matched", "; ".join(map(_reason, items)))
        for site, items in by_site.items()
    ]


def _reason(item: Covered) -> str:
    part = "" if item.n_compared == item.n_expected else f" ({item.n_compared} of {item.n_expected} positions)"
    if item.n_elsewhere:
        part += f" (without {item.n_elsewhere} tokens that not every run sent to this expert)"
    return f"{item.pair.target.name}: {item.pair.reason}{part}"
