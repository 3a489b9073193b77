"""Recognising entries in a log file by their patterns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..store.errors import InputError
from .entries import Entry, entries

#: Longer lines (base64, progress bars) are cut before patterns are tried.
_LONGEST = 4000


@dataclass(frozen=True)
class LogMatch:
    """An entry that a log shows.

    Attributes:
        entry: the entry.
        lines: numbers of the lines that match, from 1.
        text: the first of them.
    """

    entry: Entry
    lines: tuple[int, ...]
    text: str


def match_log(path: Path) -> list[LogMatch]:
    """Entries whose pattern matches a line of a log, in order of their first line.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return match_lines(lines)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def match_lines(lines: Iterable[str]) -> list[LogMatch]:
    """The same for lines of text."""
    found: dict[str, tuple[list[int], str]] = {}
    for number, line in enumerate(lines, 1):
        for item in matching(line):
            numbers, _ = found.setdefault(item.id, ([], line[:_LONGEST].strip()))
            numbers.append(number)
    return [LogMatch(entries()[name], tuple(numbers), text) for name, (numbers, text) in found.items()]


def matching(line: str) -> Iterator[Entry]:
    """Entries that one line shows."""
    text = line[:_LONGEST].rstrip("\n")
    return (item for item in entries().values() if any(pattern.search(text) for pattern in item.logs))
