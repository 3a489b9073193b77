"""The journal beside an open shard: what is stored so far, one checked line per tensor.

A line is appended after the tensor's bytes have been handed to the operating system. Both survive the death
of the process, so every journalled tensor can be salvaged from the unfinished shard without HDF5's help.

Format: UTF-8 lines, each an XXH3-64 checksum (16 hexadecimal digits), a space and JSON. The first line is a
header object, the others are arrays in the order of `index.SCHEMA`. A line that is incomplete or fails its
checksum ends the journal: it was being written when the process died.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from .errors import FormatError
from .index import FORMAT_VERSION, SCHEMA


@dataclass(frozen=True)
class JournalHeader:
    """Which shard a journal belongs to."""

    run: str
    rank: int
    number: int


class Journal:
    """Append-only journal of one open shard."""

    def __init__(self, path: Path, header: JournalHeader) -> None:
        """Create the journal; it must not exist yet."""
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._append(
            {
                "journal": "tensorsleuth",
                "version": FORMAT_VERSION,
                "run": header.run,
                "rank": header.rank,
                "number": header.number,
            }
        )

    def append(self, row: tuple[object, ...]) -> None:
        """Acknowledge one tensor whose bytes have been written."""
        self._append(row)

    def _append(self, value: object) -> None:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
        line = b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)
        written = os.write(self._fd, line)
        while written < len(line):
            written += os.write(self._fd, line[written:])

    def close(self) -> None:
        """Close the file; its content stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> tuple[JournalHeader | None, list[tuple[Any, ...]]]:
    """Read the intact part of a journal.

    Returns:
        The header (None when not even that was complete) and the acknowledged rows in `index.SCHEMA` order.

    Raises:
        FormatError: the journal was written by another format version.
    """
    values: list[Any] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        checksum, _, text = line.partition(b" ")
        if xxhash.xxh3_64_hexdigest(text).encode() != checksum:
            break
        values.append(json.loads(text))
    if not values:
        return None, []
    header = values[0]
    if header.get("version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {header.get('version')}, this tensorsleuth reads {FORMAT_VERSION}; "
            "repair it with the version that wrote it"
        )
    rows = [tuple(value) for value in values[1:] if len(value) == len(SCHEMA)]
    return JournalHeader(header["run"], header["rank"], header["number"]), rows
