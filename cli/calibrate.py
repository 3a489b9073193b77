"""The command calibrate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..store import InputError, Trace
from .console import Json, TracePath, print_json, print_table, progress, say

if TYPE_CHECKING:
    from ..analyze.calibration.learned import Calibration
    from ..store.progress import Progress


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(calibrate)


def calibrate(
    trace: TracePath,
    good: Annotated[
        list[str],
        typer.Option(
            metavar="R,B,T",
            help="Reference, baseline and target of a known-good port (R,T without a baseline); may be repeated.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the calibration.")] = "default",
    json: Json = False,
) -> None:
    """Learn limits from known-good ports, for compare --calibration."""
    from ..analyze.calibration.learn import calibrate as learn

    opened = Trace.open(trace)
    with progress("calibrate") as update:
        comparisons = [_compared(opened, runs, update) for runs in good]
        calibration = learn(opened, list(dict.fromkeys(comparisons)), name, progress=update)
    if json:
        print_json(calibration.as_dict())
    else:
        _print(calibration)


def _compared(trace: Trace, runs: str, update: Progress) -> str:
    """The comparison of known-good runs: the latest there is, or a new one named `good-TARGET`."""
    from ..analyze.compare import ComparisonRequest, compare
    from ..analyze.verdict import Thresholds

    parts = [part.strip() for part in runs.split(",")]
    if len(parts) not in (2, 3) or not (parts[0] and parts[-1]):
        raise InputError(f"--good {runs!r} cannot be read; write REFERENCE,BASELINE,TARGET or REFERENCE,TARGET")
    reference, target = parts[0], parts[-1]
    baseline = parts[1] or None if len(parts) == 3 else None
    for run in filter(None, (reference, baseline, target)):
        trace.manifest(run)
    found = trace.query(
        """SELECT comparison FROM comparisons
           WHERE reference = ? AND baseline IS NOT DISTINCT FROM ? AND target = ? ORDER BY created_at DESC LIMIT 1""",
        [reference, baseline, target],
    ).to_pylist()
    if found:
        return str(found[0]["comparison"])
    tolerance = Thresholds(relative_l2=None if baseline else 1.0)  # whatever it measures is known to be good
    return compare(
        trace, ComparisonRequest(reference, target, baseline, f"good-{target}", tolerance), progress=update
    ).comparison


def _print(calibration: Calibration) -> None:
    limits = calibration.thresholds
    rows = [
        ("tau_R", limits.tau_r),
        ("theta (cosine of logits)", limits.theta),
        ("delta (KL, nats)", limits.delta),
        ("top-1 agreement", limits.top1),
        ("relative L2 (two runs)", limits.relative_l2),
    ]
    print_table(f"calibration {calibration.name}", ("limit", "value"), rows)
    kinds = sorted(limits.tau_r_by_kind.items(), key=lambda item: item[1], reverse=True)
    print_table("kinds of sites with the largest limits", ("kind", "tau_R"), kinds[:5])
    sources = calibration.sources
    say(
        f"learnt from {sources['n_r']} values of R at {sources['n_kinds']} kinds of sites, "
        f"{sources['n_logits']} positions of logits, {len(sources['comparisons'])} comparisons"
    )
