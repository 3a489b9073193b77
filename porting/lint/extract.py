"""Makes the table of names and signatures that `api` reads, from source checkouts of the releases.

    python -m tensorsleuth.porting.lint.extract OUTPUT 2.28=NXD_SRC,NXDI_SRC 2.29=NXD_SRC,NXDI_SRC

The folders hold the packages `neuronx_distributed` and `neuronx_distributed_inference`. Files are parsed, not run. The
table keeps facts only: which modules, functions, classes, methods and parameters there are, which names a module
imports, which methods are left to subclasses, and how the library itself calls the methods of its classes.
"""

from __future__ import annotations

import ast
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("neuronx_distributed", "neuronx_distributed_inference")
_VERSION = re.compile(r"""__version__\s*=\s*["']([^"']+)["']""")


def extract_release(folders: Sequence[Path]) -> dict[str, Any]:
    """The table of one release.

    Args:
        folders: folders that hold the packages.
    """
    modules: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for package in PACKAGES:
        root = next(folder / package for folder in folders if (folder / package).is_dir())
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = extract_module(path.read_text(encoding="utf-8"), name, is_package=is_package)
        text = (root / "_version.py").read_text(encoding="utf-8")
        found = _VERSION.search(text)
        versions[package] = found[1] if found else "unknown"
    return {"versions": versions, "modules": modules}


def extract_module(source: str, name: str, *, is_package: bool = False) -> dict[str, Any]:
    """Names that one module defines or imports.

    Args:
        source: its text.
        name: its dotted name.
        is_package: whether it is a package's `__init__`.

    Returns:
        `functions` and `classes` by name, `names` (other assignments), `imports` (name to `module` or `module:name`),
        and `stars` (modules of `import *`).
    """
    tree = ast.parse(source)
    found: dict[str, Any] = {"functions": {}, "classes": {}, "names": [], "imports": {}, "stars": []}
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found["functions"][node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            found["classes"][node.name] = extract_class(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found["imports"][alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            _add_from(node, name, is_package, found)
        else:
            found["names"] += [target.id for target in _assigned(node) if isinstance(target, ast.Name)]
    found["names"] = sorted(set(found["names"]))
    return {key: value for key, value in found.items() if value}


def extract_class(node: ast.ClassDef) -> dict[str, Any]:
    """Bases, methods, attributes, keyword arguments taken out of `**kwargs`, abstract methods and calls of a class."""
    methods = {item.name: item for item in _statements(node.body) if isinstance(item, ast.FunctionDef)}
    constants = [
        target.id for item in _statements(node.body) for target in _assigned(item) if isinstance(target, ast.Name)
    ]
    attributes = {target.attr for method in methods.values() for target in _attributes(method)}
    facts = {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": {name: signature(method) for name, method in methods.items()},
        "attributes": sorted(attributes | set(constants)),
        "kwargs": sorted(_taken_keywords(methods["__init__"])) if "__init__" in methods else [],
        "abstract": sorted(name for name, method in methods.items() if _is_abstract(method)),
        "calls": _calls(methods.values()),
    }
    return {key: value for key, value in facts.items() if value}


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Decorators that change how a function is called, then its parameters; annotations are left out."""
    kinds = [
        f"@{text} "
        for text in (ast.unparse(item) for item in node.decorator_list)
        if text.rpartition(".")[2] in ("staticmethod", "classmethod", "property", "cached_property", "setter")
    ]
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return f"{''.join(kinds)}({ast.unparse(arguments)})"


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block and of the conditionals in it: names defined either way are names."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield node


def _add_from(node: ast.ImportFrom, module: str, is_package: bool, found: dict[str, Any]) -> None:
    source = absolute_module(node, module, is_package=is_package)
    for alias in node.names:
        if alias.name == "*":
            found["stars"].append(source)
        else:
            found["imports"][alias.asname or alias.name] = f"{source}:{alias.name}"


def absolute_module(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """The module that `from ... import` names, with relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _assigned(node: ast.stmt) -> Iterator[ast.expr]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    for target in targets:
        yield from target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]


def _attributes(method: ast.FunctionDef) -> Iterator[ast.Attribute]:
    """Attributes of `self` that a method assigns."""
    for node in ast.walk(method):
        if isinstance(node, ast.stmt):
            for target in _assigned(node):
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    yield target


def _taken_keywords(method: ast.FunctionDef) -> Iterator[str]:
    """Keys that a method takes out of its `**kwargs`."""
    rest = method.args.kwarg.arg if method.args.kwarg else None
    for node in ast.walk(method):
        key: ast.expr | None = None
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("pop", "get")
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == rest
            and node.args
        ):
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == rest:
            key = node.slice
        elif (
            isinstance(node, ast.Compare)
            and isinstance(node.ops[0], ast.In)
            and isinstance(node.comparators[0], ast.Name)
            and node.comparators[0].id == rest
        ):
            key = node.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def _is_abstract(method: ast.FunctionDef) -> bool:
    """Whether a method does nothing but raise NotImplementedError."""
    body = [item for item in method.body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])


def _calls(methods: Iterable[ast.FunctionDef]) -> dict[str, list[list[Any]]]:
    """How a class calls its own methods: number of positional arguments, names of keywords, the methods that call."""
    calls: dict[str, list[list[Any]]] = {}
    for method in methods:
        for node in ast.walk(method):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("self", "cls")
            ):
                continue
            if any(isinstance(item, ast.Starred) for item in node.args):
                continue
            shape = [len(node.args), sorted(word.arg for word in node.keywords if word.arg is not None)]
            shapes = calls.setdefault(node.func.attr, [])
            known = next((one for one in shapes if one[:2] == shape), None)
            if known is None:
                shapes.append([*shape, [method.name]])
            elif method.name not in known[2]:
                known[2].append(method.name)
    return calls


def main(arguments: Sequence[str]) -> int:
    """Write the table; returns the exit code."""
    if len(arguments) < 2 or any("=" not in item for item in arguments[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    releases = {}
    for item in arguments[1:]:
        release, _, folders = item.partition("=")
        releases[release] = extract_release([Path(folder) for folder in folders.split(",")])
    text = json.dumps(releases, separators=(",", ":"), sort_keys=True)
    Path(arguments[0]).write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
