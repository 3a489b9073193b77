"""Commands of the group port that run ports: compile, infer, validate."""

from __future__ import annotations

import typer


def register(group: typer.Typer) -> None:
    """Add the commands to the group port."""
