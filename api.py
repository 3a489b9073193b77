"""The same verbs as the command line, in Python: `import tensorsleuth as ts; trace = ts.open("mytrace")`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .analyze.calibration.learn import calibrate, load_calibration
from .analyze.calibration.learned import Calibration
from .analyze.compare import ComparisonRequest, ComparisonSummary, compare
from .analyze.sql_library import run_sql
from .analyze.verdict import Thresholds
from .store import Trace as StoredTrace

if TYPE_CHECKING:
    import torch

    from .analyze.diagnosis import Finding
    from .analyze.localization.localize import Localization
    from .analyze.logits import LogitReport
    from .capture.recorder import Recorder
    from .capture.replay import ReplaySummary
    from .capture.selection import Selection


class Trace(StoredTrace):
    """A trace directory with the product's verbs: record, compare, sql."""

    def record(
        self,
        model: torch.nn.Module,
        *,
        run: str,
        role: str,
        selection: Selection | None = None,
        **options: Any,
    ) -> AbstractContextManager[Recorder]:
        """Record every forward pass of a model inside a `with` block; see `capture.record`."""
        from .capture.recorder import record

        return record(self, model, run=run, role=role, selection=selection, **options)

    def compare(
        self,
        *,
        reference: str,
        target: str,
        baseline: str | None = None,
        name: str | None = None,
        thresholds: Thresholds | None = None,
        mapping: Path | None = None,
        replicates: Sequence[str] = (),
        calibration: str | None = None,
    ) -> ComparisonSummary:
        """Compare runs site by site; see `analyze.compare`.

        Args:
            reference, target, baseline, name, mapping: see `analyze.compare.ComparisonRequest`.
            thresholds: limits; those of the calibration, or the defaults, when None.
            replicates: runs that show how the baseline scatters.
            calibration: name of a calibration that `calibrate` made.
        """
        learnt = load_calibration(self, calibration) if calibration else None
        limits = thresholds or (learnt.thresholds if learnt else Thresholds()).adapted(None, None, baseline is not None)
        return compare(
            self,
            ComparisonRequest(
                reference,
                target,
                baseline,
                name,
                limits,
                mapping=mapping,
                replicates=tuple(replicates),
                calibration=learnt,
            ),
        )

    def calibrate(self, comparisons: Sequence[str], *, name: str = "default") -> Calibration:
        """Learn limits from comparisons of known-good ports; see `analyze.calibration`."""
        return calibrate(self, comparisons, name)

    def logits(self, comparison: str, *, site: str | None = None, greedy: str | None = None) -> LogitReport:
        """Judge the next-token distributions of a comparison; see `analyze.logits.judge_logits`."""
        from .analyze.logits import judge_logits

        return judge_logits(self, comparison, site=site, greedy=greedy)

    def localize(self, comparison: str) -> Localization:
        """Say where the error of a comparison comes from, and keep it; see `analyze.localization`."""
        from .analyze.localization.localize import localize

        return localize(self, comparison)

    def diagnose(self, comparison: str) -> list[Finding]:
        """Name the cause where error comes in, with evidence; see `analyze.diagnosis`."""
        from .analyze.diagnosis import diagnose

        return diagnose(self, comparison)

    def replay(
        self,
        comparison: str,
        *,
        model: Path | None = None,
        modules: Sequence[str] = (),
        tp: int | None = None,
        mapping: Path | None = None,
        random: int | None = None,
    ) -> ReplaySummary:
        """Run the reference's modules on the target's own inputs and compare; see `capture.replay.ReplayRequest`."""
        from .capture.replay import ReplayRequest, replay

        return replay(self, ReplayRequest(comparison, model, tuple(modules), tp, mapping, random))

    def sql(self, statement: str) -> pa.Table:
        """Run one read-only SQL statement with the standard library; `.to_pandas()` works on the result."""
        return run_sql(self, statement)


def open(path: str | os.PathLike[str], *, create: bool = False) -> Trace:
    """Open a trace.

    Args:
        path: its folder.
        create: make an empty trace if there is none.

    Raises:
        TraceNotFoundError: there is none and `create` is false.
    """
    return Trace.create(path) if create else Trace.open(path)
