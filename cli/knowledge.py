"""The command group kb: the knowledge base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Json, print_json, print_table, say

if TYPE_CHECKING:
    from ..references import Entry

_LINES = 8


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Look up known problems of ports: symptom, cause, remedy.")
    group.command("search")(search)
    group.command("match")(match)
    group.command("show")(show)
    group.command("list")(list_entries)
    app.add_typer(group, name="kb")


def search(
    text: Annotated[list[str], typer.Argument(help="What you see, in any words.")],
    limit: Annotated[int, typer.Option(min=1, help="Entries at most.")] = 10,
    json: Json = False,
) -> None:
    """Find entries by words, the best first."""
    from ..references import search as find

    hits = find(" ".join(text), limit=limit)
    if json:
        print_json([{**_plain(hit.entry), "score": hit.score} for hit in hits])
    elif hits:
        print_table("", ("id", "area", "what", "symptom"), [_row(hit.entry) for hit in hits])
    else:
        say("no entry has any of these words; 'sleuth kb list' lists all", "yellow")


def match(
    logfile: Annotated[Path, typer.Argument(help="Log of a compilation, a conversion or a run.")],
    json: Json = False,
) -> None:
    """Recognise known problems in a log; exits with 1 when there are any."""
    from ..references import match_log

    found = match_log(logfile)
    if json:
        print_json([{**_plain(one.entry), "lines": one.lines, "text": one.text} for one in found])
    for one in () if json else found:
        more = f" and {len(one.lines) - _LINES} more" if len(one.lines) > _LINES else ""
        lines = ", ".join(map(str, one.lines[:_LINES])) + more
        say(f"{logfile}:{lines}", "bold")
        say(f"   seen      {one.text}")
        _print(one.entry)
    if not found and not json:
        say(f"{logfile}: no line matches a known problem", "yellow")
    raise typer.Exit(1 if found else 0)


def show(
    name: Annotated[str, typer.Argument(metavar="ID", help="Id of an entry, or a cause that diagnose named.")],
    json: Json = False,
) -> None:
    """Show one entry."""
    from ..references import entry

    found = entry(name)
    if json:
        print_json(_plain(found))
    else:
        _print(found)


def list_entries(
    area: Annotated[str | None, typer.Option(help="Only this area.")] = None,
    json: Json = False,
) -> None:
    """List all entries."""
    from ..references import entries
    from ..store.errors import InputError

    known = list(entries().values())
    areas = sorted({item.area for item in known})
    if area is not None and area not in areas:
        raise InputError(f"there is no area {area!r}; the areas: {', '.join(areas)}")
    chosen = [item for item in known if area in (None, item.area)]
    if json:
        print_json([_plain(item) for item in chosen])
    else:
        print_table("", ("id", "area", "what"), [(item.id, item.area, item.title) for item in chosen])


def _row(item: Entry) -> tuple[str, str, str, str]:
    return item.id, item.area, item.title, item.symptom


def _plain(item: Entry) -> dict[str, Any]:
    return {**asdict(item), "logs": [pattern.pattern for pattern in item.logs]}


def _print(item: Entry) -> None:
    say(f"{item.id}: {item.title}", "bold")
    fields = (("symptom", item.symptom), ("cause", item.cause), ("remedy", item.remedy), ("beware", item.misread))
    for label, text in fields:
        if text:
            say(f"   {label:9} {text}")
    if item.findings:
        say(f"   {'diagnosed':9} sleuth diagnose calls it {', '.join(item.findings)}")
