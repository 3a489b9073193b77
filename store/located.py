"""Rows of the `tensors` table by id, read once per shard and kept until the catalog changes."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

#: Shards whose rows are kept.
_KEPT = 16
_QUERY = """
SELECT tensor_id, module, port, slot, call, dims, position_start, dtype, shape, file_offset, nbytes, dataset, s.path
FROM tensors t JOIN shards s USING (run, rank, shard)
WHERE (run, rank, shard) IN (SELECT (run, rank, shard) FROM tensors WHERE tensor_id = ?)
ORDER BY tensor_id
"""

Query = Callable[[str, list[Any]], pa.Table]


class LocatedTensors:
    """Where tensors are stored. One query answers for all tensors of a shard, whose ids are consecutive."""

    def __init__(self, catalog: Path, query: Query) -> None:
        """Look up in a catalog, through a function that runs one statement."""
        self._catalog, self._query = catalog, query
        self._state: tuple[int, ...] = ()
        self._shards: OrderedDict[int, pa.Table] = OrderedDict()

    def find(self, tensor_id: int) -> dict[str, Any] | None:
        """The row of a tensor with the path of its shard, or None."""
        state = self._stat()
        if state != self._state:
            self._shards.clear()
            self._state = state
        for first, rows in self._shards.items():
            if first <= tensor_id <= rows["tensor_id"][-1].as_py():
                self._shards.move_to_end(first)
                return _row(rows, tensor_id)
        rows = self._query(_QUERY, [tensor_id])
        if not rows.num_rows:
            return None
        self._shards[rows["tensor_id"][0].as_py()] = rows
        if len(self._shards) > _KEPT:
            self._shards.popitem(last=False)
        return _row(rows, tensor_id)

    def _stat(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._catalog)
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _row(rows: pa.Table, tensor_id: int) -> dict[str, Any] | None:
    place = pc.index(rows["tensor_id"], tensor_id).as_py()
    return None if place < 0 else dict(rows.slice(place, 1).to_pylist()[0])
