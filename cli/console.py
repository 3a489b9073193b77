"""How commands speak: tables or JSON on stdout, progress on stderr, one line per error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..store.progress import Progress

#: Exit code of each verdict.
EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
VERDICT_STYLES = {"pass": "green", "fail": "bold red", "undecided": "yellow"}

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TracePath = Annotated[str, typer.Argument(metavar="TRACE", help="Folder of the trace.")]

#: Columns when the output is no terminal, where nothing should be cut off.
_WIDE = 200


def stdout() -> Console:
    """A console on standard output; plain and wide when that is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def print_json(value: Any) -> None:
    """Print a value as JSON; numbers that JSON lacks (NaN, infinities) become null or text."""
    print(json.dumps(_clean(value), indent=2, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, styles: bool = True) -> None:
    """Print rows as a table; numbers are right-aligned and rounded for reading, verdicts coloured."""
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
    numeric = [
        any(isinstance(row[i], (int, float)) and not isinstance(row[i], bool) for row in rows)
        for i in range(len(columns))
    ]
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) if styles else Text(cell_text(value)) for value in row))
    stdout().print(table)


def say(text: str, style: str = "") -> None:
    """Print one line on standard output."""
    stdout().print(Text(text, style=style), soft_wrap=True)


def warn(text: str) -> None:
    """Print one line on standard error."""
    Console(stderr=True, highlight=False).print(Text(text, style="yellow"), soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A progress bar on standard error, shown only on a terminal.

    Yields:
        A callback for a stage, the steps done and the steps in all.
    """
    console = Console(stderr=True)
    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def update(stage: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=f"{title}: {stage}", completed=done, total=total or None)

        yield update


def cell_text(value: Any) -> str:
    """A value as the text of a table cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(cell_text(item) for item in value) + "]"
    return str(value)


def human_bytes(n: float) -> str:
    """A number of bytes for people: `1.5 MB` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""


def _cell(value: Any) -> Text:
    return Text(cell_text(value), style=VERDICT_STYLES.get(value, "") if isinstance(value, str) else "")


def _clean(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value
