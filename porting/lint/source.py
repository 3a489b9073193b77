"""Port files as parsed source: what their names refer to, what their classes derive from."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...store.errors import InputError
from .api import Entry, Release
from .extract import absolute_module
from .signatures import Signature, of_function

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Name:
    """A name that is not the library's and not the port's: `torch.nn.Module`."""

    text: str


@dataclass(frozen=True)
class LocalFunction:
    """A function that a port file defines at its top level."""

    file: PortFile
    node: Function


@dataclass(frozen=True, eq=False)
class PortClass:
    """A class that a port file defines.

    Attributes:
        file: the file.
        node: its definition.
    """

    file: PortFile
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """Its name."""
        return self.node.name

    @property
    def methods(self) -> dict[str, Function]:
        """Its own methods by name."""
        return {item.name: item for item in self.node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}

    @property
    def bases(self) -> list[Thing]:
        """What it derives from."""
        return [self.file.resolve(base) or Name(ast.unparse(base)) for base in self.node.bases]

    def lineage(self) -> Iterator[PortClass | Entry | Name]:
        """The class and all its bases, nearest first."""
        queue: list[Thing] = [self]
        seen: set[Thing] = set()
        while queue:
            one = queue.pop(0)
            if one in seen:
                continue
            seen.add(one)
            if isinstance(one, PortClass):
                yield one
                queue.extend(one.bases)
            elif isinstance(one, Entry):
                yield from (self.file.release.lineage(one) if one.kind == "class" else [one])
            elif isinstance(one, Name):
                yield one

    def derives_from(self, *names: str) -> bool:
        """Whether a class of the library of one of these names is among its bases."""
        return any(isinstance(one, Entry) and one.kind == "class" and one.name in names for one in self.lineage())

    @property
    def is_module(self) -> bool:
        """Whether it is a torch module, as far as its bases are known."""
        return any(
            one.text.endswith("nn.Module") or one.text in ("Module", "builtins.nn.Module")
            for one in self.lineage()
            if isinstance(one, (Entry, Name))
        )

    @property
    def fully_known(self) -> bool:
        """Whether every base is the port's, the library's or plain torch, so that a missing name is missing."""
        return not any(
            isinstance(one, Name) or (isinstance(one, Entry) and one.kind == "external")
            for one in self.lineage()
            if not (isinstance(one, (Name, Entry)) and one.text.endswith(("nn.Module", "object", "ABC", "Enum")))
        )

    def library_bases(self) -> Iterator[Entry]:
        """Classes of the library among its bases, nearest first."""
        yield from (one for one in self.lineage() if isinstance(one, Entry) and one.kind == "class")

    def own_method(self, name: str) -> tuple[PortClass, Function] | None:
        """The nearest definition of a method in the port's own classes."""
        for one in self.lineage():
            if isinstance(one, PortClass) and name in one.methods:
                return one, one.methods[name]
        return None

    def signature(self, name: str) -> Signature | None:
        """Signature of a method wherever it is defined, None if nothing known defines it."""
        for one in self.lineage():
            if isinstance(one, PortClass) and name in one.methods:
                return of_function(one.methods[name], method=True)
            if isinstance(one, Entry) and one.kind == "class":
                found = self.file.release.method(one, name)
                if found is not None:
                    return found[1]
        return None


Thing = Entry | PortClass | LocalFunction | Name


class PortFile:
    """One parsed file.

    Attributes:
        path: where it is.
        release: the release it is judged by.
        tree: its syntax tree.
        lines: its lines.
        imports: what imported names stand for: `module` or `module:name`.
        classes: its top-level classes by name.
        functions: its top-level functions by name.
        parents: parent of every node of the tree.
    """

    def __init__(self, path: Path, release: Release, family: dict[Path, PortFile] | None = None) -> None:
        """Parse a file.

        Args:
            path: the file.
            release: the release it is judged by.
            family: files that were parsed already, shared by those that import each other.

        Raises:
            InputError: it cannot be read, or is not Python.
        """
        try:
            text = path.read_text(encoding="utf-8")
            self.tree = ast.parse(text, str(path))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        except SyntaxError as error:
            raise InputError(f"{path}:{error.lineno} is not Python: {error.msg}") from error
        self.path, self.release, self.lines = path, release, text.splitlines()
        self._family = family if family is not None else {}
        self._family[path.resolve()] = self
        self._nodes = list(ast.walk(self.tree))
        self._by_kind: dict[tuple[type[ast.AST], ...], list[ast.AST]] = {}
        self._inside: dict[ast.AST, list[ast.AST]] = {}
        self._resolved: dict[str, Thing | None] = {}
        self.parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self.imports = self._imports()
        self.classes = {node.name: PortClass(self, node) for node in self._nodes if isinstance(node, ast.ClassDef)}
        self.functions = {
            node.name: node
            for node in self._nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not self._in_class(node)
        }

    def _imports(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        found[alias.asname] = alias.name
                    else:
                        root = alias.name.partition(".")[0]
                        found[root] = root
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{module}:{alias.name}"
        return found

    def _in_class(self, node: ast.AST) -> bool:
        return isinstance(self.parents.get(node), ast.ClassDef)

    def enclosing(self, node: ast.AST, *kinds: type[ast.AST]) -> ast.AST | None:
        """The nearest enclosing node of some kinds."""
        parent = self.parents.get(node)
        while parent is not None and not isinstance(parent, kinds):
            parent = self.parents.get(parent)
        return parent

    def class_around(self, node: ast.AST) -> PortClass | None:
        """The class a node is in."""
        found = self.enclosing(node, ast.ClassDef)
        return self.classes.get(found.name) if isinstance(found, ast.ClassDef) else None

    def function_around(self, node: ast.AST) -> Function | None:
        """The outermost function or method a node is in."""
        found: Function | None = None
        parent = self.parents.get(node)
        while parent is not None:
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found = parent
            parent = self.parents.get(parent)
        return found

    def resolve(self, node: ast.expr) -> Thing | None:
        """What a name or dotted name refers to; None for variables and for names of the library that do not exist."""
        if isinstance(node, ast.Name):
            return self._resolve_name(node.id)
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            if isinstance(base, Name):
                text = f"{base.text}.{node.attr}"
                return self._library(base.text, node.attr) if self.release.covers(base.text) else Name(text)
            if isinstance(base, Entry) and base.kind == "module":
                return self.release.find(base.module, node.attr)
            if isinstance(base, Entry) and base.kind == "external":
                return Entry("external", base.text, node.attr)
        return None

    def _library(self, module: str, name: str) -> Thing | None:
        return self.release.find(module, name)

    def _resolve_name(self, name: str) -> Thing | None:
        if name not in self._resolved:
            self._resolved[name] = None  # for names that refer to themselves, through files that import each other
            self._resolved[name] = self._look_up(name)
        return self._resolved[name]

    def _look_up(self, name: str) -> Thing | None:
        if name in self.classes:
            return self.classes[name]
        if name in self.functions:
            return LocalFunction(self, self.functions[name])
        source = self.imports.get(name)
        if source is None:
            return None
        module, separator, inner = source.partition(":")
        if self.release.covers(module):
            if separator:
                return self.release.find(module, inner)
            return Entry("module", module) if self.release.has_module(module) else None
        sibling = self.sibling(module, inner if separator else "")
        if sibling is not None and separator:
            return sibling.resolve(ast.Name(inner, ast.Load())) or Name(f"{module}.{inner}")
        return Name(f"{module}.{inner}" if separator else module)

    def sibling(self, module: str, name: str = "") -> PortFile | None:
        """A file of the port that an import names, by a relative or absolute module, if it is there."""
        level = len(module) - len(module.lstrip("."))
        inner = module.lstrip(".")
        folder = self.path.parent
        roots = [folder, *folder.parents[:2]] if not level else [folder.parents[level - 2] if level > 1 else folder]
        parts = inner.split(".") if inner else []
        for root in roots:
            for tail in (parts, [*parts, name] if name else parts):
                candidate = root.joinpath(*tail).with_suffix(".py") if tail else None
                if candidate is not None and candidate.is_file() and candidate.resolve() != self.path.resolve():
                    return self.related(candidate)
        return None

    def related(self, path: Path) -> PortFile | None:
        """Another file, parsed once for all that import each other; None if it cannot be."""
        known = self._family.get(path.resolve())
        if known is not None:
            return known
        try:
            return PortFile(path, self.release, self._family)
        except InputError:
            return None

    def is_guarded(self, node: ast.AST) -> bool:
        """Whether an import may fail: inside `try` with a handler for import errors, or for type checking only."""
        inner, parent = node, self.parents.get(node)
        while parent is not None:
            if isinstance(parent, ast.Try) and inner in parent.body and any(map(_catches_imports, parent.handlers)):
                return True
            if isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.unparse(parent.test):
                return True
            inner, parent = parent, self.parents.get(parent)
        return False

    def walk(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        """All nodes of some kinds, outer ones first."""
        if kinds not in self._by_kind:
            self._by_kind[kinds] = [node for node in self._nodes if isinstance(node, kinds)]
        yield from self._by_kind[kinds]

    def within(self, node: ast.AST) -> list[ast.AST]:
        """A node and everything below it."""
        if node not in self._inside:
            self._inside[node] = list(ast.walk(node))
        return self._inside[node]

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that an import names; relative ones as they are written."""
        return absolute_module(node, "", is_package=False) if not node.level else "." * node.level + (node.module or "")


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        ast.unparse(name) in ("ImportError", "ModuleNotFoundError", "Exception", "BaseException", "AttributeError")
        for name in names
    )


def port_files(path: Path, release: Release) -> list[PortFile]:
    """The files of a port: one file, or those of a folder that import the library.

    Args:
        path: a Python file or a folder.
        release: the release they are judged by.

    Raises:
        InputError: there is nothing to check.
    """
    family: dict[Path, PortFile] = {}
    if path.is_file():
        return [PortFile(path, release, family)]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; name the port's Python file, or its folder")
    files = [
        file
        for file in sorted(path.rglob("*.py"))
        if not _is_test(file.relative_to(path).parts) and _is_about_neuron(file)
    ]
    if not files:
        raise InputError(f"no Python file in {path} imports neuronx_distributed_inference; name the port's file")
    return [family.get(file.resolve()) or PortFile(file, release, family) for file in files]


def _is_test(parts: Sequence[str]) -> bool:
    return any(part in ("test", "tests") for part in parts) or parts[-1].startswith(("test_", "conftest"))


def _is_about_neuron(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    return "neuron" in text.lower()
