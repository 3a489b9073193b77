"""Reading a closed shard: the index through HDF5, tensors through a memory map at their recorded offsets."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from .dtypes import dtype_named
from .errors import FormatError, IntegrityError
from .hdf5_file import INDEX_DATASET, MANIFEST_DATASET
from .index import FORMAT_VERSION, decode


class ShardReader:
    """A closed shard, mapped read-only. Arrays it returns are views that keep the map alive."""

    def __init__(self, path: Path) -> None:
        """Map the file; HDF5 is not involved until the index is asked for.

        Raises:
            IntegrityError: the file is missing or empty.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"shard {path} cannot be mapped: {error}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)

    def array(self, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> npt.NDArray[Any]:
        """The values of one tensor, zero-copy.

        Args:
            dtype: torch dtype name.
            shape: axis lengths.
            offset: byte offset in the file; -1 for tensors without elements.
            nbytes: size of the values.

        Raises:
            IntegrityError: the recorded range lies outside the file.
        """
        kind = dtype_named(dtype)
        if nbytes == 0:
            return np.empty(shape, kind)
        if offset < 0 or offset + nbytes > len(self._bytes):
            raise IntegrityError(
                f"shard {self.path} is truncated: a tensor should end at byte {offset + nbytes}, "
                f"the file has {len(self._bytes)}; recapture the run or restore the file"
            )
        raw = self._bytes[offset : offset + nbytes]
        if raw.ctypes.data % kind.alignment:
            raw = raw.copy()
        return raw.view(kind).reshape(shape)

    def checksum(self, offset: int, nbytes: int) -> str:
        """XXH3-128 of a byte range, hexadecimal."""
        if nbytes == 0:
            return xxhash.xxh3_128_hexdigest(b"")
        if offset < 0 or offset + nbytes > len(self._bytes):
            raise IntegrityError(f"shard {self.path} is truncated at byte {len(self._bytes)}")
        return xxhash.xxh3_128_hexdigest(self._bytes[offset : offset + nbytes].data)

    def release_pages(self) -> None:
        """Tell the kernel that the mapped pages are not needed soon (keeps resident memory flat)."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._bytes


def read_seal(path: Path) -> tuple[pa.Table, bytes, str]:
    """Index, manifest bytes and index checksum of a closed shard.

    Raises:
        FormatError: the shard has another format version, or is no shard at all.
        IntegrityError: the file is damaged.
    """
    try:
        with h5py.File(os.fspath(path), "r") as file:
            version = file.attrs.get("tensorsleuth_format")
            if version is None:
                raise FormatError(f"{path} is an HDF5 file but no shard of tensorsleuth; move it out of the trace")
            if int(version) != FORMAT_VERSION:
                raise FormatError(
                    f"shard {path} has format version {int(version)}, this tensorsleuth reads {FORMAT_VERSION}; "
                    "use the version that wrote it"
                )
            checksum = bytes(file.attrs["index_checksum"]).decode()
            index = file[INDEX_DATASET][()].tobytes()
            manifest = file[MANIFEST_DATASET][()].tobytes()
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise IntegrityError(f"shard {path} cannot be opened as HDF5 ({error}); it is truncated or damaged") from error
    if xxhash.xxh3_128_hexdigest(index) != checksum:
        raise IntegrityError(f"the index of shard {path} does not match its checksum; restore the file")
    return decode(index), manifest, checksum
