"""What a release of NxD and NxD Inference offers: modules, names, classes, methods and their parameters."""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ...store.errors import InputError
from .extract import PACKAGES
from .signatures import CallShape, Signature, of_text

_TABLE = "releases.json.xz"
_DEPTH = 8


@dataclass(frozen=True)
class Entry:
    """A name of a release.

    Attributes:
        kind: `module`, `function`, `class`, `value`, or `external` for what the library itself imports from elsewhere.
        module: the module that defines it; of a module, its own name.
        name: its name there; empty for a module.
    """

    kind: str
    module: str
    name: str = ""

    @property
    def text(self) -> str:
        """Dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


class Release:
    """The names of one release; see `load_release`."""

    def __init__(self, name: str, table: dict[str, Any]) -> None:
        """`table` is that of `extract.extract_release`."""
        self.name = name
        self.versions: dict[str, str] = table["versions"]
        self._modules: dict[str, Any] = table["modules"]
        self._places: dict[str, list[str]] = {}
        self._subclasses: dict[str, list[Entry]] = {}
        for module, facts in self._modules.items():
            for group in ("functions", "classes", "names"):
                for known in facts.get(group, ()):
                    self._places.setdefault(known, []).append(module)

    def covers(self, module: str) -> bool:
        """Whether a dotted name belongs to the library."""
        return module.partition(".")[0] in PACKAGES

    def has_module(self, module: str) -> bool:
        """Whether the release has this module."""
        return module in self._modules or any(name.startswith(f"{module}.") for name in self._modules)

    def places(self, name: str) -> list[str]:
        """Modules of the release that define a name."""
        return self._places.get(name, [])

    def modules_called(self, leaf: str) -> list[str]:
        """Modules whose last component is `leaf`."""
        return [module for module in self._modules if module.rpartition(".")[2] == leaf]

    def names_of(self, module: str) -> list[str]:
        """Names that a module defines or imports, and its submodules."""
        facts = self._modules.get(module, {})
        own = [name for group in ("functions", "classes", "names", "imports") for name in facts.get(group, ())]
        inner = [name.rpartition(".")[2] for name in self._modules if name.rpartition(".")[0] == module]
        return sorted({*own, *inner})

    def find(self, module: str, name: str, depth: int = _DEPTH) -> Entry | None:
        """What a name of a module is, wherever the module got it from; None if it has no such name."""
        facts = self._modules.get(module)
        if facts is not None:
            for group, kind in (("classes", "class"), ("functions", "function"), ("names", "value")):
                if name in facts.get(group, ()):
                    return Entry(kind, module, name)
            if name in facts.get("imports", ()) and (found := self._imported(facts["imports"][name], depth)):
                return found
        if self.has_module(f"{module}.{name}"):
            return Entry("module", f"{module}.{name}")
        for star in (facts or {}).get("stars", ()):
            if not self.covers(star):
                return Entry("external", star, name)
            if depth and (found := self.find(star, name, depth - 1)):
                return found
        return None

    def _imported(self, source: str, depth: int) -> Entry | None:
        module, _, name = source.partition(":")
        if not self.covers(module):
            return Entry("external", module, name)
        if not name:
            return Entry("module", module)
        return self.find(module, name, depth - 1) if depth else None

    def class_facts(self, entry: Entry) -> dict[str, Any]:
        """Facts of a class: see `extract.extract_class`."""
        facts: dict[str, Any] = self._modules[entry.module]["classes"][entry.name]
        return facts

    def bases(self, entry: Entry) -> list[Entry]:
        """Base classes; external ones are of kind `external`."""
        found: list[Entry] = []
        for text in self.class_facts(entry).get("bases", ()):
            head, *rest = text.split(".")
            base = self.find(entry.module, head)
            for name in rest:
                inner = self.find(base.module, name) if base is not None and base.kind == "module" else None
                base = inner or Entry("external", base.text if base else head, name)
            found.append(base or Entry("external", "builtins", text))
        return found

    def lineage(self, entry: Entry) -> Iterator[Entry]:
        """A class and its bases, nearest first; external ones included."""
        seen: set[Entry] = set()
        queue = [entry]
        while queue:
            one = queue.pop(0)
            if one in seen:
                continue
            seen.add(one)
            yield one
            if one.kind == "class":
                queue.extend(self.bases(one))

    def method(self, entry: Entry, name: str) -> tuple[Entry, Signature] | None:
        """The class that defines a method, and its signature."""
        for one in self.lineage(entry):
            if one.kind == "class":
                text = self.class_facts(one).get("methods", {}).get(name)
                if text is not None:
                    return one, of_text(text, method=True)
        return None

    def is_abstract(self, entry: Entry, name: str) -> bool:
        """Whether the nearest definition of a method only raises NotImplementedError."""
        found = self.method(entry, name)
        return found is not None and name in self.class_facts(found[0]).get("abstract", ())

    def calls(self, entry: Entry, name: str, replaced: Collection[str] = ()) -> list[CallShape]:
        """How a class and its bases call a method of their own.

        Args:
            entry: the class.
            name: the method.
            replaced: methods that a subclass replaces: their calls, and calls that only they lead to, do not count.
        """
        return [
            CallShape(positional, tuple(keywords))
            for positional, keywords, callers in self._calls_of(entry, name)
            if any(self._is_live(entry, caller, frozenset(replaced)) for caller in callers)
        ]

    def _calls_of(self, entry: Entry, name: str) -> Iterator[tuple[int, list[str], list[str]]]:
        for one in self.lineage(entry):
            if one.kind == "class":
                yield from self.class_facts(one).get("calls", {}).get(name, ())

    def _is_live(self, entry: Entry, method: str, replaced: frozenset[str]) -> bool:
        """Whether a method still runs: not replaced, and called from outside or by one that still runs."""
        if method in replaced:
            return False
        callers = {caller for _, _, names in self._calls_of(entry, method) for caller in names} - {method}
        return not callers or any(self._is_live(entry, caller, replaced | {method}) for caller in callers)

    def members(self, entry: Entry, group: str) -> set[str]:
        """`attributes`, `kwargs` or `methods` of a class and its bases."""
        return {
            name for one in self.lineage(entry) if one.kind == "class" for name in self.class_facts(one).get(group, ())
        }

    def subclasses(self, name: str) -> list[Entry]:
        """Classes that have a class of this name among their bases."""
        if name not in self._subclasses:
            entries = [
                Entry("class", module, known)
                for module, facts in self._modules.items()
                for known in facts.get("classes", ())
            ]
            self._subclasses[name] = [
                entry for entry in entries if any(base.name == name for base in self.lineage(entry) if base != entry)
            ]
        return self._subclasses[name]

    def function(self, entry: Entry) -> Signature:
        """Signature of a function."""
        return of_text(self._modules[entry.module]["functions"][entry.name], method=False)


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    data = resources.files(__package__).joinpath(_TABLE).read_bytes()
    table: dict[str, Any] = json.loads(lzma.decompress(data))
    return table


def known_releases() -> tuple[str, ...]:
    """Releases of the Neuron SDK that there is a table for, oldest first."""
    return tuple(sorted(_table(), key=lambda name: [int(part) for part in name.split(".")]))


@functools.lru_cache(maxsize=4)
def load_release(name: str) -> Release:
    """The table of a release, for example `2.28`.

    Raises:
        InputError: there is none for it.
    """
    if name not in _table():
        raise InputError(f"no table for Neuron SDK {name}; choose one of {', '.join(known_releases())}")
    return Release(name, _table()[name])
