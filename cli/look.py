"""Commands that look into a trace: runs, tensors, show, sql."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..store import InputError, Trace, TraceNotFoundError
from .console import Json, TracePath, human_bytes, print_json, print_table, say


class Format(str, Enum):
    """Output formats of `sleuth sql`."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (runs, tensors, show, sql):
        app.command()(command)


def runs(trace: TracePath, json: Json = False) -> None:
    """List the runs of a trace."""
    opened = Trace.open(trace)
    rows = opened.query(
        """SELECT r.run, role, stack, model, dtype, status, created_at,
                  (SELECT count(*) FROM prompts p WHERE p.run = r.run) AS prompts,
                  (SELECT count(*) FROM tensors t WHERE t.run = r.run) AS tensors,
                  (SELECT sum(bytes) FROM shards s WHERE s.run = r.run)::BIGINT AS bytes,
                  provenance
           FROM runs r ORDER BY ordinal"""
    ).to_pylist()
    if json:
        print_json(rows)
        return
    shown = ("run", "role", "stack", "model", "dtype", "status", "prompts", "tensors")
    table = [(*(row[name] for name in shown), human_bytes(row["bytes"] or 0)) for row in rows]
    print_table("", (*shown, "on disk"), table)
    known = {row["run"] for row in rows}
    for name in opened.run_names():
        if name not in known:
            say(
                f"run {name!r} is on disk but not in the catalog: 'sleuth index {trace}' or 'sleuth repair {trace}'",
                "yellow",
            )


def tensors(
    trace: TracePath,
    run: Annotated[str | None, typer.Option(help="Only this run.")] = None,
    module: Annotated[str | None, typer.Option(help="Only modules that match this glob.")] = None,
    phase: Annotated[str | None, typer.Option(help="prefill, decode, forward or static.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Only this prompt.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many rows.")] = 100,
    json: Json = False,
) -> None:
    """List recorded tensors with their ids, shapes and statistics."""
    filters: list[str] = []
    values: list[Any] = []
    for clause, value in (("run = ?", run), ("module GLOB ?", module), ("phase = ?", phase), ("prompt = ?", prompt)):
        if value is not None:
            filters.append(clause)
            values.append(value)
    where = f"WHERE {' AND '.join(filters)}" if filters else ""
    columns = "tensor_id, run, module, port, slot, prompt, phase, step, call, dims, shape, dtype, mean, std, absmax"
    order = "run, prompt NULLS LAST, step, exec_order, seq"
    statement = f"SELECT {columns}, n_nan, n_inf FROM tensors {where} ORDER BY {order} LIMIT {limit}"  # noqa: S608
    rows = Trace.open(trace).query(statement, values).to_pylist()
    if json:
        print_json(rows)
        return
    if not rows:
        raise TraceNotFoundError(f"{trace} has no such tensor; list all with 'sleuth tensors {trace}'")
    print_table("", list(rows[0]), [list(row.values()) for row in rows])
    if len(rows) == limit:
        say(f"(the first {limit}; more with --limit)", "dim")


def show(
    trace: TracePath,
    tensor_id: Annotated[int, typer.Argument(metavar="TENSOR_ID", help="As listed by 'sleuth tensors'.")],
    save: Annotated[Path | None, typer.Option(help="Write the values to this .npy file (bfloat16 as float32).")] = None,
    json: Json = False,
) -> None:
    """Show one tensor: where it comes from, its statistics and a corner of its values."""
    import numpy as np

    opened = Trace.open(trace)
    rows = opened.query("SELECT * EXCLUDE (file_offset, seq) FROM tensors WHERE tensor_id = ?", [tensor_id]).to_pylist()
    if not rows:
        raise TraceNotFoundError(f"{trace} has no tensor {tensor_id}; 'sleuth tensors {trace}' lists them")
    row = rows[0]
    values = opened.tensor(tensor_id).values if row["dataset"] else None
    if save is not None:
        if values is None:
            raise InputError(f"tensor {tensor_id} was captured as statistics only; there are no values to save")
        np.save(save, values.astype(np.float32) if values.dtype.kind == "V" or values.dtype.itemsize < 4 else values)
    if json:
        print_json({**row, "values": None if values is None else values.reshape(-1)[:64].astype(np.float64).tolist()})
        return
    print_table(f"tensor {tensor_id}", ("field", "value"), [(key, value) for key, value in row.items()])
    if values is not None:
        with np.printoptions(precision=5, threshold=64, edgeitems=3, linewidth=120):
            print(values.astype(np.float64) if values.dtype.kind not in "cbiu" else values)


def sql(
    trace: TracePath,
    statement: Annotated[str | None, typer.Argument(metavar="SQL", help="A SELECT over the catalog.")] = None,
    format_: Annotated[Format, typer.Option("--format", help="Output format.")] = Format.table,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here (needed for parquet).")] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the standard library of views, macros and functions.")
    ] = False,
    external_access: Annotated[bool, typer.Option(help="Let the statement read other files (off by default).")] = False,
    json: Json = False,
) -> None:
    """Ask the trace anything: read-only SQL over its tables, views and macros."""
    from ..analyze.sql_library import objects, run_sql

    if list_:
        listing = [(item.name, item.kind, item.summary) for item in objects()]
        if json:
            print_json([dict(zip(("name", "kind", "summary"), row, strict=True)) for row in listing])
        else:
            print_table("SQL standard library", ("name", "kind", "what it tells"), listing)
        return
    if not statement:
        raise InputError("there is no SQL statement; give one, or --list for what the library offers")
    rows = run_sql(Trace.open(trace), statement, external_access=external_access)
    _write_rows(rows, Format.json if json else format_, output)


def _write_rows(rows: Any, format_: Format, output: Path | None) -> None:
    if format_ is Format.parquet:
        import pyarrow.parquet as pq

        if output is None:
            raise InputError("--format parquet needs a file: add -o FILE.parquet")
        pq.write_table(rows, output)
        return
    if output is not None and format_ is Format.csv:
        import pyarrow.csv

        pyarrow.csv.write_csv(_flat(rows), output)
        return
    if output is not None:
        raise InputError("-o writes csv or parquet; for tables and JSON redirect the output")
    if format_ is Format.json:
        print_json(rows.to_pylist())
    elif format_ is Format.csv:
        import sys

        import pyarrow.csv

        sys.stdout.flush()
        pyarrow.csv.write_csv(_flat(rows), sys.stdout.buffer)
        sys.stdout.buffer.flush()
    else:
        print_table("", rows.column_names, [list(row.values()) for row in rows.to_pylist()], styles=True)
        say(f"({rows.num_rows} rows)", "dim")


def _flat(rows: Any) -> Any:
    """CSV has no lists: they become text."""
    import pyarrow as pa

    for index, field in enumerate(rows.schema):
        if pa.types.is_nested(field.type):
            text = [None if value is None else str(value) for value in rows.column(index).to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(text, pa.string()))
    return rows
