"""The command replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import Trace
from .console import EXIT_CODES, VERDICT_STYLES, Json, TracePath, print_json, print_table, progress, say
from .mapping import MappingFile

if TYPE_CHECKING:
    from ..capture.replay import ReplaySummary

_COLUMNS = ("module", "in the target", "phase", "R_local", "95 % interval", "R in place", "verdict", "computed on")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(replay)


def replay(
    trace: TracePath,
    comparison: Annotated[str, typer.Argument(metavar="C", help="Comparison whose target gives the inputs.")],
    model: Annotated[
        Path | None, typer.Option(help="Model folder of the reference; where it was captured from by default.")
    ] = None,
    modules: Annotated[list[str] | None, typer.Option(help="Only reference modules that match this glob.")] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Ranks over which the target sums; as the run says by default.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random inputs instead; needs a target made by 'sleuth capture hf'.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    mapping: MappingFile = None,
    json: Json = False,
) -> None:
    """Run the reference's modules on the target's own inputs: which modules add error of their own?"""
    from ..capture.replay import ReplayRequest, replayed_sites
    from ..capture.replay import replay as replay_comparison

    opened = Trace.open(trace)
    request = ReplayRequest(comparison, model, tuple(modules or ()), tp, mapping, seed if random else None)
    with progress("replay") as update:
        summary = replay_comparison(opened, request, progress=update)
    if json:
        print_json({**_facts(summary), "modules": replayed_sites(opened, summary)})
    else:
        _print(opened, summary)
    raise typer.Exit(EXIT_CODES[summary.verdict])


def _facts(summary: ReplaySummary) -> dict[str, Any]:
    facts = {name: value for name, value in summary.__dict__.items() if name not in ("inputs", "left_out", "injecting")}
    return {
        **facts,
        "left_out": [item.__dict__ for item in summary.left_out],
        "injecting": [item.__dict__ for item in summary.injecting],
    }


def _print(trace: Trace, summary: ReplaySummary) -> None:
    from ..capture.replay import replayed_sites

    print_table(
        f"{summary.comparison}: error that each module adds on its own input",
        _COLUMNS,
        [
            (
                row["site"],
                row["target_site"],
                row["phase"],
                row["r_local"],
                None if row["r_low"] is None else f"{row['r_low']:.3g} .. {row['r_high']:.3g}",
                row["r_in_place"],
                row["verdict"],
                row["inputs"],
            )
            for row in replayed_sites(trace, summary)
        ],
    )
    for found in summary.injecting:
        say(f"injects: {found.text}", "bold red")
    say(
        f"verdict: {summary.verdict}; {summary.n_replayed} modules replayed, "
        f"{len({item.site for item in summary.left_out})} sites left out",
        VERDICT_STYLES[summary.verdict],
    )
    for reason in summary.reasons:
        say(f"  - {reason}")
    holes: dict[str, int] = {}
    for item in summary.left_out:
        holes[item.reason] = holes.get(item.reason, 0) + 1
    for reason, n in holes.items():
        say(f"  left out, {n} sites: {reason}")
