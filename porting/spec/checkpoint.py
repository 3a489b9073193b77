"""Names and shapes of a checkpoint's weights, read from headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from ...store.errors import InputError

#: A header longer than this is no header (the format's own limit).
_LONGEST_HEADER = 100_000_000


def checkpoint_keys(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Shape by name of every weight in a model folder's safetensors files, None when there are none.

    Raises:
        InputError: a file is no safetensors file.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        return None
    return {name: shape for file in files for name, shape in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        if length > _LONGEST_HEADER:
            raise InputError(f"{file} is no safetensors file; name a complete model folder")
        try:
            entries = json.loads(stream.read(length))
            return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the header of {file} cannot be read: {error}; name a complete model folder") from error
