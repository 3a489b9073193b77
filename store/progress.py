"""Telling a caller how far a long operation has come."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then by operations that take a while."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Report a stage, the steps done and the steps in all (0 when unknown)."""


def no_progress(stage: str, done: int = 0, total: int = 0) -> None:
    """Report nothing."""
