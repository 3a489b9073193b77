"""The command import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..store import Trace
from .console import Json, TracePath, human_bytes, print_json, print_table, progress, say, warn

if TYPE_CHECKING:
    from ..capture.importers import ImportSummary


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("import")(import_)


def import_(
    trace: TracePath,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder (or one file) of dumped tensors.")],
    run: Annotated[str, typer.Option(help="Name of the new run.")],
    role: Annotated[str, typer.Option(help="reference, baseline or target.")],
    format_: Annotated[str, typer.Option("--format", help="auto, nxdi, vllm-neuron, equivalence or tensors.")] = "auto",
    tokens: Annotated[
        Path | None, typer.Option(help='Tokens file, JSONL: {"token_ids": [...], "n_prompt": 6}.')
    ] = None,
    tokens_from: Annotated[str | None, typer.Option(help="A run of the trace that computed the same prompts.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree, where the files do not tell.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Rank that a dump of one rank comes from.")] = 0,
    json: Json = False,
) -> None:
    """Import tensors that another tool dumped; files that cannot be used are listed with the reason."""
    from ..capture.importers import ImportOptions, import_dump

    options = ImportOptions(tokens, tokens_from, tp, rank)
    with progress(f"import {run}") as update:
        summary = import_dump(
            Trace.create(trace), source, run=run, role=role, format=format_, options=options, progress=update
        )
    if json:
        print_json(summary.__dict__)
    else:
        _print_summary(summary)


def _print_summary(summary: ImportSummary) -> None:
    rows = [
        ("format", summary.format),
        ("files", str(summary.n_files)),
        ("tensors", f"{summary.n_tensors}, {summary.positions} of them with positions"),
        ("prompts with tokens", str(summary.n_prompts)),
        ("tensor-parallel degree", str(summary.tp)),
        ("values", human_bytes(summary.nbytes)),
        ("on disk", human_bytes(summary.stored_nbytes)),
        ("time", f"{summary.seconds:.2f} s"),
    ]
    print_table(f"run {summary.run}", ("what", "imported"), rows)
    for line in summary.assumptions:
        say(f"assumed: {line}")
    places: dict[str, list[str]] = {}
    for place, note in summary.notes.items():
        places.setdefault(note, []).append(place)
    for note, where in places.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        say(f"note: {where[0]}{more}: {note}")
    for place, reason in summary.skipped.items():
        warn(f"skipped: {place}: {reason}")
