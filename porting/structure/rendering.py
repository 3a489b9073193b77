"""Writing module trees: compressed and full JSON, text for people, and a flat list of paths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tree import Group, ModuleNode, compress

#: Attributes that text shows: those that change what a module computes.
_SHOWN = (
    "eps",
    "variance_epsilon",
    "rms_norm_eps",
    "sliding_window",
    "softmax_scale",
    "scaling",
    "head_dim",
    "attention_chunk_size",
    "is_causal",
    "top_k",
    "num_experts",
    "padding_idx",
    "act_fn",
)


def write_tree(tree: ModuleNode, folder: Path, side: str) -> list[Path]:
    """Write the four files of one model: `model_tree_<side>.json`, `_full.json`, `_pretty.txt`, `_flat_paths.txt`.

    Args:
        tree: the model.
        folder: where they go; made if missing.
        side: `source` or `target`.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        f"model_tree_{side}.json": _dumps(compressed_dict(tree)),
        f"model_tree_{side}_full.json": _dumps(full_dict(tree)),
        f"model_tree_{side}_pretty.txt": "\n".join(pretty_lines(tree)) + "\n",
        f"model_tree_{side}_flat_paths.txt": "\n".join(flat_paths(tree)) + "\n",
    }
    files = []
    for name, text in contents.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        files.append(path)
    return files


def full_dict(node: ModuleNode) -> dict[str, Any]:
    """The whole tree, JSON-ready."""
    return {**_facts(node), "children": [full_dict(child) for child in node.children]}


def compressed_dict(node: ModuleNode) -> dict[str, Any]:
    """The tree with layers that are alike written once, JSON-ready: `count` of them, named by `name`."""
    return {**_facts(node), "children": [_group_dict(group) for group in compress(node)]}


def _group_dict(group: Group) -> dict[str, Any]:
    return {
        **_facts(group.node),
        "name": group.label,
        "count": group.count,
        "children": [_group_dict(inner) for inner in group.groups],
    }


def _facts(node: ModuleNode) -> dict[str, Any]:
    return {
        "name": node.name,
        "path": node.path,
        "class": node.cls,
        "defined_in": node.origin,
        "n_parameters": node.n_parameters,
        "parameters": {name: list(shape) for name, shape in node.parameters.items()},
        "attributes": node.attributes,
    }


def pretty_lines(tree: ModuleNode) -> Iterator[str]:
    """The compressed tree as text, one module a line: name, class, shapes, attributes, number of parameters."""
    yield f"{_description(tree)}"
    yield from _branches(compress(tree), "")


def _branches(groups: Sequence[Group], indent: str) -> Iterator[str]:
    for place, group in enumerate(groups):
        last = place == len(groups) - 1
        times = f" x {group.count}" if group.count > 1 else ""
        yield f"{indent}{'`-- ' if last else '|-- '}{group.label}{times}: {_description(group.node)}"
        yield from _branches(group.groups, indent + ("    " if last else "|   "))


def _description(node: ModuleNode) -> str:
    parts = [node.cls]
    parts += [f"{name} {list(shape)}" for name, shape in node.parameters.items()]
    parts += [f"{name}={node.attributes[name]}" for name in _SHOWN if node.attributes.get(name) is not None]
    if node.n_parameters:
        parts.append(f"({node.n_parameters:,} parameters)")
    return " ".join(parts)


def flat_paths(tree: ModuleNode) -> list[str]:
    """Paths of all modules but the root, in definition order."""
    return [node.path for node in tree.walk() if node.path]


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
