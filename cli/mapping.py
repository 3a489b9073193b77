"""The command map."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import InputError, Trace
from .console import Json, TracePath, print_json, print_table, progress, say

if TYPE_CHECKING:
    from ..analyze.pairs import SiteMapping

MappingFile = Annotated[
    Path | None, typer.Option(help="component_mapping.json whose pairs override what is found.", metavar="FILE")
]
_UNDECIDED = 3


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("map")(map_)


def map_(
    trace: TracePath,
    reference: Annotated[str, typer.Option(help="Run that is the ground truth.")],
    target: Annotated[str, typer.Option(help="Run under test.")],
    baseline: Annotated[
        str | None, typer.Option(help="Same model as the reference, in the target's precision: tells what is noise.")
    ] = None,
    mapping: MappingFile = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the mapping as component_mapping.json.", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Show which sites of a target correspond to those of a reference, how, and why; exit code 3 if some do not."""
    from ..analyze.align import match_prompts
    from ..analyze.component_export import export_components
    from ..analyze.matching import map_runs

    opened = Trace.open(trace)
    for run in (reference, baseline, target):
        if run is not None:
            opened.manifest(run)
    prompts = match_prompts(opened, reference, baseline, target)
    with progress("map") as update:
        mapped = map_runs(opened, (reference, baseline, target), prompts, file=mapping, progress=update)
    if write is not None:
        body = export_components(mapped.mapping, mapped.reference, mapped.target)
        try:
            write.write_text(json_text.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{write} cannot be written: {error.strerror}") from error
    if json:
        print_json(_as_json(mapped.mapping))
    else:
        _print(mapped.mapping, write)
    raise typer.Exit(_UNDECIDED if any(gap.status == "unmatched" for gap in mapped.mapping.gaps) else 0)


def _as_json(mapping: SiteMapping) -> dict[str, Any]:
    return {
        "origin": mapping.origin,
        "pairs": [
            {
                "reference": pair.reference.name,
                "target": pair.target.name,
                "transform": pair.transform,
                "transform_spec": pair.transform_spec,
                "score": pair.score,
                "reason": pair.reason,
            }
            for pair in mapping.pairs
        ],
        "gaps": [{"site": gap.site.name, "status": gap.status, "reason": gap.reason} for gap in mapping.gaps],
        "ambiguous": [
            {"site": note.site.name, "candidates": [site.name for site in note.candidates], "reason": note.reason}
            for note in mapping.ambiguous
        ],
    }


def _print(mapping: SiteMapping, written: Path | None) -> None:
    rows = [(p.reference.name, p.target.name, p.transform, p.score, p.reason) for p in mapping.pairs]
    print_table(f"mapping ({mapping.origin})", ("reference", "target", "transform", "score", "reason"), rows)
    if mapping.gaps:
        gaps = [(gap.site.name, gap.status, gap.reason) for gap in mapping.gaps]
        print_table("without a counterpart", ("reference", "status", "reason"), gaps)
    if mapping.ambiguous:
        notes = [(n.site.name, ", ".join(site.name for site in n.candidates), n.reason) for n in mapping.ambiguous]
        print_table("ambiguous", ("reference", "candidates", "reason"), notes)
    matched = len({pair.reference for pair in mapping.pairs})
    unmatched = sum(gap.status == "unmatched" for gap in mapping.gaps)
    say(
        f"{matched} sites matched, {unmatched} unmatched, {len(mapping.gaps) - unmatched} skipped, "
        f"{len(mapping.ambiguous)} ambiguous"
    )
    if written is not None:
        say(f"written to {written}")
