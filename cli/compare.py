"""The command compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import Trace
from .console import EXIT_CODES, VERDICT_STYLES, Json, TracePath, print_json, print_table, progress, say
from .mapping import MappingFile

if TYPE_CHECKING:
    from ..analyze.compare import ComparisonSummary

_COLUMNS = ("site", "in the target", "phase", "R", "95 % interval", "q", "relative L2", "W1", "state", "verdict")
_BEFORE, _AFTER = 4, 3


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(compare)


def compare(
    trace: TracePath,
    reference: Annotated[str, typer.Option(help="Run that is the ground truth (FP32).")],
    target: Annotated[str, typer.Option(help="Run under test.")],
    baseline: Annotated[
        str | None, typer.Option(help="Same model as the reference, in the target's precision.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the comparison; the target's name by default.")] = None,
    tau_r: Annotated[float | None, typer.Option(min=1.0, help="Largest R of a site; 1.2 by default.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative L2, for comparisons without a baseline.")
    ] = None,
    replicate: Annotated[
        list[str] | None, typer.Option(help="Baseline with other rounding (capture --replicate); may be repeated.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Limits learnt by sleuth calibrate, by name.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only reference modules that match this glob.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not reference modules that match this glob.")] = None,
    mapping: MappingFile = None,
    json: Json = False,
) -> None:
    """Compare a target with a reference, site by site, and name the first that diverges."""
    from ..analyze.calibration.learn import load_calibration
    from ..analyze.compare import ComparisonRequest
    from ..analyze.compare import compare as compare_runs
    from ..analyze.verdict import Thresholds

    opened = Trace.open(trace)
    learnt = load_calibration(opened, calibration) if calibration else None
    limits = (learnt.thresholds if learnt else Thresholds()).adapted(tau_r, tolerance, baseline is not None)
    request = ComparisonRequest(
        reference,
        target,
        baseline,
        name,
        limits,
        tuple(include or ()),
        tuple(exclude or ()),
        mapping,
        tuple(replicate or ()),
        learnt,
    )
    with progress("compare") as update:
        summary = compare_runs(opened, request, progress=update)
    first = first_divergence(opened, summary.comparison)
    if json:
        print_json({**summary.__dict__, "first_divergence": first})
    else:
        print_comparison(opened, summary, first)
    raise typer.Exit(EXIT_CODES[summary.verdict])


def first_divergence(trace: Trace, comparison: str) -> dict[str, Any] | None:
    """The first failing site of a comparison, or None."""
    from ..analyze.sql_library import run_sql

    statement = "SELECT * FROM first_divergence WHERE comparison = ? AND overall"
    rows = run_sql(trace, statement, [comparison]).to_pylist()
    return rows[0] if rows else None


def print_comparison(trace: Trace, summary: ComparisonSummary, first: dict[str, Any] | None) -> None:
    """Print the verdict, the sites around the first divergence and what is open."""
    from ..analyze.localization.suspects import open_suspects
    from ..analyze.sql_library import run_sql

    statement = "SELECT * FROM divergence WHERE comparison = ? ORDER BY phase_order(phase), exec_order"
    found = run_sql(trace, statement, [summary.comparison]).to_pylist()
    if first is not None:
        at = (first["phase"], first["exec_order"])
        place = next(i for i, row in enumerate(found) if (row["phase"], row["exec_order"]) == at)
        before = [row["r_ratio"] for row in found[:place] if row["r_ratio"] is not None]
        shown = found[max(place - _BEFORE, 0) : place + _AFTER + 1]
        print_table(f"{summary.comparison}: around the first divergence", _COLUMNS, list(map(_row, shown)))
        r_ratio = "undefined" if first["r_ratio"] is None else f"{first['r_ratio']:.3g}"
        say(
            f"first divergent site: {first['site']} ({first['phase']}), in the target {first['target_site']}, "
            f"R = {r_ratio}",
            "bold red",
        )
        if before:
            say(f"the {place} measurements before it: R from {min(before):.3g} to {max(before):.3g}")
    else:
        found.sort(key=lambda row: (row["r_ratio"] or -1.0, row["relative_l2"] or -1.0), reverse=True)
        print_table(f"{summary.comparison}: sites with the largest R", _COLUMNS, list(map(_row, found[:5])))
    say(
        f"verdict: {summary.verdict}; {summary.n_matched} sites matched, {summary.n_unmatched} unmatched, "
        f"{summary.n_skipped} skipped",
        VERDICT_STYLES[summary.verdict],
    )
    for reason in summary.reasons:
        say(f"  - {reason}")
    doubtful = open_suspects(trace, summary.comparison) if first is None else []
    if doubtful:
        one = doubtful[0]
        say(f"  R = {one.r_ratio:.3g} of {one.site} ({one.phase}) may be noise, or a bug of its size;")
        say(f"  which of both, its causes tell: sleuth diagnose {trace.path} {summary.comparison}")
    for note in summary.notes:
        say(f"  ({note})")
    if summary.n_unmatched:
        say(f"  which ones: sleuth sql {trace.path} 'FROM coverage_holes'")


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    interval = None if row["r_low"] is None else f"{row['r_low']:.4g} .. {row['r_high']:.4g}"
    numbers = (row["r_ratio"], interval, row["q_value"], row["relative_l2"], row["qq_w1"])
    return (row["site"], row["target_site"], row["phase"], *numbers, row["state"], row["verdict"])
