"""Commands of the group port about structure: tree, map, classes."""

from __future__ import annotations

import typer


def register(group: typer.Typer) -> None:
    """Add the commands to the group port."""
