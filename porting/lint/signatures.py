"""Signatures as data: whether a call fits one, and whether one method can stand in for another."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass

_FIRST = {"instance": 1, "class": 1, "property": 1, "static": 0, "function": 0}


@dataclass(frozen=True)
class CallShape:
    """How something is called.

    Attributes:
        positional: number of positional arguments.
        keywords: names of keyword arguments.
        more_positional: there is a `*arguments` of unknown length.
        more_keywords: there is a `**arguments` of unknown keys.
    """

    positional: int
    keywords: tuple[str, ...] = ()
    more_positional: bool = False
    more_keywords: bool = False

    @classmethod
    def of(cls, call: ast.Call) -> CallShape:
        """The shape of a call in source text."""
        starred = [isinstance(item, ast.Starred) for item in call.args]
        return cls(
            starred.count(False),
            tuple(word.arg for word in call.keywords if word.arg is not None),
            any(starred),
            any(word.arg is None for word in call.keywords),
        )


@dataclass(frozen=True)
class Signature:
    """Parameters of a function or method, without `self` or `cls`.

    Attributes:
        kind: `function`, `instance`, `class`, `static` or `property`.
        positional: names of the parameters that can be given by position, in order.
        required: those of them, and of the keyword-only ones, without a default.
        positional_only: how many of the first cannot be given by name.
        keyword_only: names of keyword-only parameters.
        star: takes any further positional arguments.
        double_star: takes any further keyword arguments.
    """

    kind: str
    positional: tuple[str, ...]
    required: frozenset[str]
    positional_only: int
    keyword_only: tuple[str, ...]
    star: bool
    double_star: bool

    @property
    def names(self) -> frozenset[str]:
        """Names that can be used as keywords."""
        return frozenset((*self.positional[self.positional_only :], *self.keyword_only))

    def problem(self, call: CallShape) -> str | None:
        """Why a call does not fit, or None if it does.

        Returns:
            One of `unknown argument 'x'`, `argument 'x' is missing`, `takes n positional arguments, is given m`.
        """
        if not self.double_star:
            for name in call.keywords:
                if name not in self.names:
                    return f"unknown argument {name!r}"
        if not self.star and call.positional > len(self.positional):
            return f"takes {len(self.positional)} positional arguments, is given {call.positional}"
        given = {*self.positional[: call.positional], *call.keywords}
        if call.more_keywords or call.more_positional:
            return None
        for name in (*self.positional, *self.keyword_only):
            if name in self.required and name not in given:
                return f"argument {name!r} is missing"
        return None


def of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> Signature:
    """The signature of a definition in source text."""
    kind = "function"
    if method:
        kind = "instance"
        for decorator in node.decorator_list:
            name = ast.unparse(decorator).rpartition(".")[2]
            kind = {"staticmethod": "static", "classmethod": "class", "property": "property"}.get(name, kind)
            kind = "property" if name == "cached_property" else kind
    return _of_arguments(node.args, kind)


@functools.lru_cache(maxsize=4096)
def of_text(text: str, *, method: bool) -> Signature:
    """The signature of an entry of the releases' table: decorators, then parameters in parentheses."""
    decorators, _, _ = text.partition("(")
    node = ast.parse(f"def f{text[len(decorators) :]}: pass").body[0]
    if not isinstance(node, ast.FunctionDef):
        raise TypeError(f"not a signature: {text}")
    kind = "instance" if method else "function"
    for word in decorators.split():
        name = word.rpartition(".")[2].removeprefix("@")
        kind = {"staticmethod": "static", "classmethod": "class", "property": "property"}.get(name, kind)
        kind = "property" if name == "cached_property" else kind
    return _of_arguments(node.args, kind)


def _of_arguments(arguments: ast.arguments, kind: str) -> Signature:
    skip = _FIRST[kind]
    positional = [item.arg for item in (*arguments.posonlyargs, *arguments.args)]
    n_defaults = len(arguments.defaults)
    required = set(positional[: len(positional) - n_defaults])
    required |= {
        item.arg for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
    }
    if skip and not positional:  # def method(*args)
        skip = 0
    return Signature(
        kind,
        tuple(positional[skip:]),
        frozenset(required - set(positional[:skip])),
        max(len(arguments.posonlyargs) - skip, 0),
        tuple(item.arg for item in arguments.kwonlyargs),
        arguments.vararg is not None,
        arguments.kwarg is not None,
    )


def override_problem(own: Signature, base: Signature, calls: Iterable[CallShape]) -> str | None:
    """Why a method cannot stand in for the one it overrides, or None if it can.

    Args:
        own: the override.
        base: what it overrides.
        calls: how the library calls the method.
    """
    if own.kind != base.kind:
        bound, free = {"instance"}, {"static", "class"}
        if (own.kind in bound and base.kind in free) or (own.kind == "property") != (base.kind == "property"):
            return f"is {_KINDS[own.kind]}, where the base class has {_KINDS[base.kind]}"
    if own.kind == "property":
        return None
    for name in (*own.positional, *own.keyword_only):
        known = name in base.names or base.star or base.double_star
        if name in own.required and not known and len(own.positional) > len(base.positional):
            return f"requires {name!r}, which callers of the base class do not pass"
    for call in calls:
        if base.problem(call) is None and (why := own.problem(call)):
            return f"does not fit the library's own call of it: {why}"
    needed = len([name for name in base.positional if name in base.required])
    if not own.star and len(own.positional) < needed:
        return f"takes {len(own.positional)} arguments, where the base class is given {needed}"
    return None


_KINDS = {
    "instance": "an instance method",
    "class": "a class method",
    "static": "a static method",
    "property": "a property",
    "function": "a function",
}
