"""What a planted bug declares about itself; the analysis never sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .architectures import Architecture

#: What a severity is: a number, or a variant by name; None for a bug that is there or not.
Severity = Any


@dataclass(frozen=True)
class Fault:
    """One bug.

    Attributes:
        name: short name.
        summary: what is wrong, in a sentence.
        cause: what a diagnosis has to call it, in the words of `causes.ACCEPTED`; by severity where that matters.
        own: globs over module paths that the bug sits in or whose tensors it is the first to change.
        plant: puts it into a port.
        accept: module paths that name the place as well, with `{}` for the layer that shows it first.
        needs: features an architecture must have.
        without: features it must not have.
        severities: how strongly it is planted.
    """

    name: str
    summary: str
    cause: str | Mapping[Severity, str]
    own: tuple[str, ...]
    plant: Callable[[Any, Severity], None]
    accept: tuple[str, ...] = ()
    needs: str = ""
    without: str = ""
    severities: tuple[Severity, ...] = (None,)

    def cause_of(self, severity: Severity) -> str:
        """What a diagnosis has to call it."""
        return self.cause if isinstance(self.cause, str) else self.cause[severity]

    def applies_to(self, architecture: Architecture) -> bool:
        """Whether the architecture has what the bug needs."""
        needs, without = frozenset(self.needs.split()), frozenset(self.without.split())
        return needs <= architecture.features and not without & architecture.features


def label(severity: Severity) -> str:
    """A severity as text."""
    if severity is None:
        return "-"
    return f"{severity:g}" if isinstance(severity, (int, float)) else str(severity)
