"""The command port lint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import EXIT_CODES, Json, print_json, print_table, say

if TYPE_CHECKING:
    from ..porting.lint.linter import LintReport

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def register(group: typer.Typer) -> None:
    """Add the command to the group port."""
    group.command("lint")(lint)


def lint(
    port: Annotated[
        str, typer.Argument(metavar="PORT", help="The port's Python file, or FILE:CLASS, or its folder.")
    ] = "",
    sdk: Annotated[str, typer.Option(help="Release of the Neuron SDK to judge by.")] = "2.28",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Hugging Face checkpoint whose keys the port has to use; runs the port's conversion."),
    ] = None,
    config: Annotated[str, typer.Option(help="Configuration class as FILE:CLASS, where the port names none.")] = "",
    tp: Annotated[int, typer.Option(help="Tensor-parallel degree that the conversion is told.")] = 1,
    ignore: Annotated[list[str] | None, typer.Option(help="Rule to leave out; may be given several times.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules and exit.")] = False,
    json: Json = False,
) -> None:
    """Check a port against a release of the Neuron SDK, without the SDK: exit 1 with errors."""
    from ..porting.lint.linter import all_rules
    from ..porting.lint.linter import lint as check
    from ..store.errors import InputError

    if rules:
        known = [(rule.id, rule.severity, rule.summary) for rule in all_rules().values()]
        if json:
            print_json([dict(zip(("rule", "severity", "summary"), row, strict=True)) for row in known])
        else:
            print_table("", ("rule", "severity", "what it finds"), known)
        return
    if not port:
        raise InputError("name the port's Python file: sleuth port lint PORT")
    report = check(port, sdk, ignore=ignore or (), checkpoint=checkpoint, config=config, tp=tp)
    if json:
        print_json(report.as_dict())
    else:
        _show(report)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _show(report: LintReport) -> None:
    for item in report.diagnostics:
        say(f"{item.place}: {item.severity} [{item.rule}] {item.message}", _STYLES[item.severity])
        say(f"    {item.fix}")
    counts = ", ".join(
        f"{report.count(severity)} {severity}{'s' * (report.count(severity) != 1)}" for severity in _STYLES
    )
    files = "1 file" if len(report.files) == 1 else f"{len(report.files)} files"
    say(f"{files}, SDK {report.release}: {counts}")
    for line in report.remarks:
        say(line)
