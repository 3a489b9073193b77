"""The command group port: what is needed to make and run ports."""

from __future__ import annotations

from typing import Annotated

import typer

from . import port_generate, port_lint, port_run, port_structure
from .console import Json, print_json, say


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="Ports to NxD Inference: the environment they need.", no_args_is_help=True)
    group.callback()(_group)
    group.command("env")(env)
    for part in (port_structure, port_generate, port_lint, port_run):
        part.register(group)
    app.add_typer(group, name="port")


def _group() -> None:
    """Ports to NxD Inference: the environment they need."""


def env(
    device: Annotated[bool, typer.Option(help="Require the Neuron SDK and its system packages too.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Exit with 4 instead of 2 when something has to be installed.")] = False,
    json: Json = False,
) -> None:
    """Print what this machine has to run ports; exit 0 ready, 2 unusable, 4 to install (--dry-run), 5 broken."""
    from ..porting.readiness import HARD_FAILURE, INSTALL_REQUIRED, check_readiness

    report = check_readiness(device=device)
    if json:
        print_json(report.as_dict())
    else:
        for line in report.lines():
            say(line)
    code = report.exit_code
    raise typer.Exit(INSTALL_REQUIRED if dry_run and code == HARD_FAILURE else code)
