"""Findings: a site, what is wrong with it, and the evidence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ...store import catalog
from ...store.trace import Trace
from .ranking import UNKNOWN

#: Causes that are worth knowing and no fault by themselves.
NOTES = frozenset({"over_precision"})


@dataclass(frozen=True)
class Finding:
    """One diagnosis.

    Attributes:
        rank: 1 for the likeliest origin.
        site, target_site: where, as the reference and the target name it.
        phase: `prefill`, `decode` or `forward`.
        cause: name of the cause, `unknown` where none is sure enough, `inherited` where the site only passes error on.
        confidence: from 0 to 1; 0 where the cause is unknown.
        summary: what is wrong, in one sentence without full stop.
        remedy: what to change.
        entry: id in the knowledge base, or empty.
        evidence: JSON-ready: `explained` (1 - ||t - h||^2 / ||t - r||^2), `residual_ratio` (||t - h|| over the noise to
            expect), `r_ratio`, `parameters` (estimates), `runner_up`, `where` (tokens, features) and `weights`;
            `in_noise` where R alone would not have made the site a suspect.
        command: a command that looks closer.
    """

    rank: int
    site: str
    target_site: str
    phase: str
    cause: str
    confidence: float
    summary: str
    remedy: str
    entry: str
    evidence: dict[str, Any]
    command: str

    @property
    def is_fault(self) -> bool:
        """Whether it says that something is wrong, rather than noteworthy."""
        return self.cause not in NOTES

    @property
    def is_named(self) -> bool:
        """Whether a cause is named."""
        return self.cause != UNKNOWN


def keep(trace: Trace, comparison: str, findings: Sequence[Finding]) -> None:
    """Replace the findings of a comparison in the catalog."""
    text = [field for field in Finding.__dataclass_fields__ if field not in ("rank", "confidence", "evidence")]
    table = pa.table(
        {
            "comparison": pa.array([comparison] * len(findings), pa.string()),
            "rank": pa.array([finding.rank for finding in findings], pa.int32()),
            "confidence": pa.array([finding.confidence for finding in findings], pa.float64()),
            "evidence": pa.array([json.dumps(_plain(finding.evidence)) for finding in findings], pa.string()),
            **{name: pa.array([getattr(finding, name) for finding in findings], pa.string()) for name in text},
        }
    )
    with catalog.writing(trace.catalog_path) as connection:
        connection.execute("DELETE FROM findings WHERE comparison = ?", [comparison])
        catalog.insert(connection, "findings", table)


def _plain(value: Any) -> Any:
    """Without infinities and NaN, which JSON lacks."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
