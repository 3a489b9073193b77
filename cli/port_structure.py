"""Commands of the group port about structure: tree, map, classes."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Json, print_json, print_table, progress, say

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of the Hugging Face checkpoint; weights are not read.")
]
Port = Annotated[str, typer.Option(help="The port's causal model class as FILE:CLASS.")]
Config = Annotated[str, typer.Option(help="Its configuration class as FILE:CLASS, where the port names none.")]
Neuron = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the port's NeuronConfig.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group port."""
    group.command("tree")(tree)
    group.command("map")(map_components)
    group.command("classes")(classes)


def tree(
    model: Model,
    port: Port = "",
    config: Config = "",
    neuron: Neuron = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the files: four of each model.")] = None,
    json: Json = False,
) -> None:
    """Print the module trees of a model and of its port, or write them to files."""
    from ..porting.structure.rendering import compressed_dict, pretty_lines, write_tree

    trees = _trees(model, port, config, neuron)
    files = [path for side, node in trees.items() if out is not None for path in write_tree(node, out, side)]
    if json:
        body: dict[str, Any] = {side: compressed_dict(node) for side, node in trees.items()}
        print_json({**body, "files": [str(path) for path in files]})
        return
    for side, node in trees.items():
        if out is None:
            say(f"{side}:", "bold")
            for line in pretty_lines(node):
                say(line)
    for path in files:
        say(str(path))


def map_components(
    model: Model,
    port: Port,
    config: Config = "",
    neuron: Neuron = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File for the mapping: component_mapping.json.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show expected differences too.")] = False,
    json: Json = False,
) -> None:
    """Map a model's modules to its port's, and tell differences of nature from suspects: exit 1 with suspects."""
    from ..porting.structure.counterparts import map_trees
    from ..porting.structure.differences import explained_mapping, find_differences

    trees = _trees(model, port, config, neuron)
    mapping = map_trees(trees["source"], trees["target"])
    differences = find_differences(trees["source"], trees["target"], mapping)
    suspects = [item for item in differences if not item.expected]
    body = explained_mapping(mapping, differences)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_text.dumps(body, indent=1) + "\n", encoding="utf-8")
    if json:
        print_json({**body, "differences": [item.as_dict() for item in differences]})
    else:
        entries = zip(body["component_mapping"], body["reasoning"], strict=True)
        rows = [(" + ".join(first), " + ".join(second), why) for (first, second), why in entries if first and second]
        print_table("", ("source", "target", "why"), rows, styles=False)
        shown = differences if every else suspects
        if shown:
            columns = ("kind", "expected", "source", "target", "what differs", "modules")
            cells = [(d.kind, "yes" if d.expected else "no", d.source, d.target, d.reason, d.count) for d in shown]
            print_table("differences", columns, cells, styles=False)
        say(f"{len(rows)} entries, {len(differences) - len(suspects)} expected differences, {len(suspects)} suspects")
        if out is not None:
            say(str(out))
    raise typer.Exit(1 if suspects else 0)


def classes(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The port's Python file; it is parsed, not run.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File: class_divergence_report.json.")] = None,
    json: Json = False,
) -> None:
    """List classes of a port that differ between the CPU and the device."""
    from ..porting.structure.divergence import find_divergences, report

    found = find_divergences(file)
    body = report(file, found)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_text.dumps(body, indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(body)
        return
    if found:
        columns = ("line", "kind", "component", "on a CPU", "on the device", "decided in", "used in lines")
        rows = [(d.line, d.kind, d.component, d.cpu, d.device, d.defined_in, list(d.users)) for d in found]
        print_table("", columns, rows, styles=False)
    say(f"{body['n_divergences']} classes differ, {body['n_kernels']} device kernels are imported")


def _trees(model: Path, port: str, config: str, neuron: list[str] | None) -> dict[str, Any]:
    from ..capture.hf import quiet_transformers
    from ..porting.structure.meta import source_on_meta, target_on_meta
    from ..porting.structure.tree import build_tree
    from .capture_nxdi import neuron_option

    quiet_transformers()
    with progress("build") as update:
        update("source", 0, 2 if port else 1)
        trees = {"source": build_tree(source_on_meta(model))}
        if port:
            update("target", 1, 2)
            options = dict(neuron_option(text) for text in neuron or ())
            trees["target"] = build_tree(target_on_meta(port, model, config=config, options=options))
    return trees
