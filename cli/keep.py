"""Commands that look after a trace: verify, repair, index, export, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..store import IntegrityError, Trace
from ..store import export as export_tables
from ..store import index as index_runs
from ..store import merge as merge_traces
from ..store import repair as repair_trace
from ..store import verify as verify_trace
from .console import Json, TracePath, human_bytes, print_json, print_table, progress, say


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (verify, repair, index, export, merge):
        app.command()(command)


def verify(trace: TracePath, json: Json = False) -> None:
    """Check every tensor, index and manifest against its checksum."""
    with progress("verify") as update:
        found = verify_trace(Trace.open(trace), progress=update)
    if json:
        print_json(
            {
                "runs": found.n_runs,
                "shards": found.n_shards,
                "tensors": found.n_tensors,
                "bytes": found.nbytes,
                "problems": list(found.problems),
            }
        )
    for problem in found.problems if not json else ():
        say(problem, "red")
    if found.problems:
        raise IntegrityError(f"{len(found.problems)} problems in {trace}: {found.problems[0]}")
    if not json:
        size = human_bytes(found.nbytes)
        say(
            f"{found.n_tensors} tensors ({size}) in {found.n_shards} shards of {found.n_runs} runs: all checksums match"
        )


def repair(trace: TracePath, json: Json = False) -> None:
    """Salvage what an interrupted capture had stored, and enter it into the catalog."""
    with progress("repair") as update:
        salvages = repair_trace(Trace.open(trace), progress=update)
    rows = [(s.run, s.shard, s.n_salvaged, s.n_damaged, s.note) for s in salvages]
    columns = ("run", "shard", "salvaged", "damaged", "note")
    if json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif rows:
        print_table("", columns, rows)
    else:
        say("nothing to salvage: every shard is sealed; the catalog is up to date")
    failed = [salvage for salvage in salvages if salvage.failed]
    if failed:
        raise IntegrityError(f"{len(failed)} problems in {trace} cannot be repaired: {failed[0].note}")


def index(
    trace: TracePath,
    rebuild: Annotated[bool, typer.Option(help="Make a new catalog from the shards.")] = False,
    json: Json = False,
) -> None:
    """Enter runs on disk into the catalog."""
    with progress("index") as update:
        counts = index_runs(Trace.open(trace), rebuild=rebuild, progress=update)
    if json:
        print_json(counts)
    elif counts:
        print_table("", ("run", "tensors"), list(counts.items()))
    else:
        say("the catalog holds every run on disk")


def export(
    trace: TracePath,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the Parquet files go.")],
    table: Annotated[list[str] | None, typer.Option(help="Only this table; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Write the catalog's tables as Parquet files."""
    counts = export_tables(Trace.open(trace), folder, tables=table or ())
    if json:
        print_json(counts)
    else:
        print_table(str(folder), ("table", "rows"), list(counts.items()))


def merge(
    trace: TracePath,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The trace to copy runs from.")],
    run: Annotated[list[str] | None, typer.Option(help="Only this run; may be repeated.")] = None,
    prefix: Annotated[str, typer.Option(help="Put before every run's name.")] = "",
    json: Json = False,
) -> None:
    """Copy runs of a trace captured elsewhere into this one, verifying them on the way."""
    source = Trace.open(other)
    with progress("merge") as update:
        counts = merge_traces(Trace.create(trace), source, runs=run or (), prefix=prefix, progress=update)
    if json:
        print_json(counts)
    else:
        print_table("", ("run", "tensors"), list(counts.items()))
