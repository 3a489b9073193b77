"""Options that every `sleuth capture` command has, and what they mean together."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..store import InputError

if TYPE_CHECKING:
    from ..capture.prompts import PromptInput
    from ..capture.selection import Selection


class Ports(str, Enum):
    """What is recorded of a module."""

    output = "output"
    both = "both"


Run = Annotated[str, typer.Option(help="Name of the new run.")]
Role = Annotated[str, typer.Option(help="reference, baseline or target.")]
PromptTexts = Annotated[list[str] | None, typer.Option(help="Prompt text; may be repeated.")]
PromptsFile = Annotated[Path | None, typer.Option(help="Prompts file: JSONL, or .txt with one prompt a line.")]
Generate = Annotated[int, typer.Option(min=1, help="Greedy tokens per prompt.")]
Teacher = Annotated[str | None, typer.Option(help="Feed the tokens of this run instead.")]
Include = Annotated[list[str] | None, typer.Option(help="Only modules that match this glob; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Not modules that match this glob; may be repeated.")]
Layers = Annotated[str | None, typer.Option(help="Only these layers, for example 0-3,7.")]
Positions = Annotated[str | None, typer.Option(help="Only these token positions, for example 0-31.")]
Io = Annotated[Ports, typer.Option(help="Record outputs, or inputs as well.")]
StatisticsOnly = Annotated[bool, typer.Option(help="Keep statistics and checksums, not values.")]
Replicates = Annotated[
    str | None,
    typer.Option(
        "--replicate",
        metavar="KIND[:N]",
        help="Round otherwise, as a clean port might: attention, summation, threads, nudge or perturb.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Prompts per batch.")]


def prompt_inputs(
    texts: list[str] | None, file: Path | None, *, teacher: str | None, generate: int
) -> list[PromptInput]:
    """The prompts that a command was given; none when a teacher's are used.

    Raises:
        InputError: options contradict each other, or the file cannot be read.
    """
    from ..capture.prompts import PromptInput, read_prompts

    if texts and file:
        raise InputError("give either --prompt or --prompts, not both")
    if teacher is not None and generate > 1:
        raise InputError("--teacher dictates the tokens; leave --generate out")
    return read_prompts(file) if file else [PromptInput(str(i), text=text) for i, text in enumerate(texts or ())]


def selection(
    include: list[str] | None, exclude: list[str] | None, layers: str | None, positions: str | None, io: Ports
) -> Selection:
    """The sites that a command was told to keep.

    Raises:
        InputError: layers or positions cannot be read.
    """
    from ..capture.selection import Selection, parse_layers, parse_positions

    return Selection(
        tuple(include or ()),
        tuple(exclude or ()),
        parse_layers(layers) if layers else None,
        parse_positions(positions) if positions else None,
        io is Ports.both,
    )
