"""What the linter says: rules, and where a port breaks one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .source import PortFile

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What a rule found at a node of the source.

    Attributes:
        node: where.
        message: what is wrong.
        fix: what to do.
    """

    node: ast.AST
    message: str
    fix: str


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: how it is named, on the command line and in `# sleuth: ignore[id]`.
        severity: `error` (wrong numbers or a crash), `warning` (wrong in some configurations), `note`.
        summary: one sentence.
        check: finds its violations in a file; None for rules that need more than the file.
    """

    id: str
    severity: str
    summary: str
    check: Callable[[PortFile], Iterator[Finding]] | None = None


@dataclass(frozen=True)
class Diagnostic:
    """A violation.

    Attributes:
        rule: id of the rule.
        severity: its severity.
        path: file.
        line: line, from 1.
        column: column, from 1.
        message: what is wrong.
        fix: what to do.
    """

    rule: str
    severity: str
    path: str
    line: int
    column: int
    message: str
    fix: str

    @property
    def place(self) -> str:
        """`file:line:column`."""
        return f"{self.path}:{self.line}:{self.column}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dict(vars(self))


RULES: dict[str, Rule] = {}


def rule(
    name: str, severity: str, summary: str
) -> Callable[[Callable[[PortFile], Iterator[Finding]]], Callable[[PortFile], Iterator[Finding]]]:
    """Register a function as the check of a rule."""

    def register(check: Callable[[PortFile], Iterator[Finding]]) -> Callable[[PortFile], Iterator[Finding]]:
        RULES[name] = Rule(name, severity, summary, check)
        return check

    return register
