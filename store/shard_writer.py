"""Writing one shard: HDF5 for the structure, plain positioned writes for the bytes.

Each tensor gets a contiguous, early-allocated dataset without attributes; its bytes go straight to the
dataset's file offset, past HDF5's locks and conversions, and are journalled afterwards. Tensors with the same
bytes share one dataset. A shard is built under a temporary name and becomes visible by an atomic rename once
its index is sealed in.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .dtypes import dtype_name
from .hdf5_file import create_file, create_tensor, creation_properties, seal, sync_folder, write_at
from .index import NO_DATASET, Statistics, TensorKey, TensorRow, to_tuple
from .journal import Journal, JournalHeader
from .statistics import statistics_of

#: The kernel starts writing to the device whenever this much has gathered.
_WRITEBACK_BYTES = 16 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]")


def shard_name(rank: int, number: int) -> str:
    """File name of a closed shard."""
    return f"rank{rank}-{number}.h5"


def partial_path(shard: Path) -> Path:
    """Where a shard lives until it is sealed."""
    return shard.with_suffix(".h5.partial")


def journal_path(shard: Path) -> Path:
    """The journal of an open shard."""
    return shard.with_suffix(".journal")


def dataset_name(seq: int, key: TensorKey) -> str:
    """A flat HDF5 name: unique by number, readable by site, free of path separators."""
    site = ":".join(part for part in (key.module, key.port, key.slot) if part)
    return f"{seq}:{_UNSAFE.sub('_', site)[:160]}"


@dataclass(frozen=True, slots=True)
class Content:
    """What identifies and describes the values of a tensor.

    Attributes:
        digest: XXH3-128 of the raw bytes.
        dtype: torch dtype name.
        statistics: see `index.Statistics`.
    """

    digest: bytes
    dtype: str
    statistics: Statistics


def content_of(array: npt.NDArray[Any]) -> Content:
    """Hash and summarise C-contiguous values.

    Raises:
        UnsupportedDtypeError: the dtype cannot be stored bit for bit.
    """
    dtype = dtype_name(array.dtype)
    raw = array.reshape(-1).view(np.uint8).data if array.size else b""
    return Content(xxhash.xxh3_128_digest(raw), dtype, statistics_of(array))


class ShardWriter:
    """One open shard. Not thread safe: the writer thread owns it."""

    def __init__(self, path: Path, run: str, rank: int, number: int) -> None:
        """Create the shard and its journal under temporary names.

        Args:
            path: final path of the shard.
            run: name of the run.
            rank: rank that writes it.
            number: running number of the shard within the rank.
        """
        self.path = path
        self.nbytes = 0
        self._flushed = 0
        self._rows: list[tuple[object, ...]] = []
        self._stored: dict[tuple[bytes, str], tuple[str, int]] = {}
        self._journal = Journal(journal_path(path), JournalHeader(run, rank, number))
        self._file = create_file(partial_path(path))
        self._fd = os.open(partial_path(path), os.O_RDWR)
        self._creation = creation_properties()

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        seq: int,
        key: TensorKey,
        array: npt.NDArray[Any],
        content: Content,
        *,
        statistics_only: bool = False,
    ) -> TensorRow:
        """Store one tensor and acknowledge it in the journal.

        Args:
            seq: running number within run and rank.
            key: where and when the tensor appeared.
            array: C-contiguous values of an accepted dtype.
            content: `content_of(array)`.
            statistics_only: keep shape, checksum and statistics, not the values.

        Raises:
            OSError: the operating system refused to write.
        """
        place = self._stored.get((content.digest, content.dtype))
        alias = place is not None
        if place is None:
            place = NO_DATASET, -1
            if not statistics_only:
                place = self._store(dataset_name(seq, key), content.dtype, array)
            self._stored[content.digest, content.dtype] = place
        dataset, offset = place
        row = TensorRow(
            seq,
            key,
            array.shape,
            content.dtype,
            array.nbytes,
            dataset,
            offset,
            alias,
            content.digest.hex(),
            content.statistics,
        )
        values = to_tuple(row)
        self._journal.append(values)
        self._rows.append(values)
        return row

    def _store(self, name: str, dtype: str, array: npt.NDArray[Any]) -> tuple[str, int]:
        offset = create_tensor(self._file, name, dtype, array.shape, self._creation)
        if offset >= 0:
            write_at(self._fd, array, offset)
            self.nbytes += array.nbytes
            self._start_writeback(offset + array.nbytes)
        return name, offset

    def _start_writeback(self, end: int) -> None:
        """Have the kernel start writing what has gathered, so that sealing finds little left to wait for.

        Of a range that is still dirty, POSIX_FADV_DONTNEED starts the write and drops nothing.
        """
        if end - self._flushed >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self._flushed, end - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = end

    def seal(self, manifest: bytes) -> Path:
        """Write the index into the shard, make it durable and give it its final name.

        Args:
            manifest: the run's manifest as JSON bytes, kept in every shard so that a run survives the loss
                of its `run.json`.

        Raises:
            OSError: the operating system refused to write; the journalled tensors stay salvageable.
        """
        seal(self._file, self._fd, self._rows, manifest)
        os.close(self._fd)
        os.rename(partial_path(self.path), self.path)
        sync_folder(self.path.parent)
        self._journal.close()
        self._journal.path.unlink()
        return self.path

    def abandon(self) -> None:
        """Let go of the files without sealing; `repair` salvages what the journal acknowledges."""
        self._journal.close()
        with suppress(RuntimeError, OSError):  # HDF5 may fail to write its metadata: nobody reads it any more
            self._file.close()
        os.close(self._fd)
