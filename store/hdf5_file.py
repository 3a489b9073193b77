"""How a shard looks as an HDF5 file.

One contiguous dataset per stored tensor, flat names, no attributes on them; two byte datasets (`__index__`, an
Arrow IPC stream, and `__manifest__`, JSON) and two root attributes (`tensorsleuth_format`, `index_checksum`).
Structure goes through HDF5's low-level API, values through plain positioned writes at a dataset's offset.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5a, h5d, h5f, h5p, h5s, h5t

from .dtypes import hdf5_type
from .index import FORMAT_VERSION, encode, to_table

INDEX_DATASET = "__index__"
MANIFEST_DATASET = "__manifest__"
_ALIGNMENT = 64


def create_file(path: Path) -> Any:
    """A new HDF5 file (low-level FileID) that HDF5 1.8 and later read, with objects aligned to 64 bytes."""
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, h5f.LIBVER_V110)
    access.set_alignment(_ALIGNMENT, _ALIGNMENT)
    return h5f.create(os.fsencode(path), h5f.ACC_EXCL, fapl=access)


def creation_properties() -> Any:
    """Dataset creation properties: contiguous, allocated at once, never filled, without timestamps."""
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    return creation


def create_tensor(file: Any, name: str, dtype: str, shape: tuple[int, ...], creation: Any) -> int:
    """Allocate the dataset of one tensor and return its byte offset, -1 when it has no elements."""
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    dataset = h5d.create(file, name.encode(), hdf5_type(dtype), space, dcpl=creation)
    offset = dataset.get_offset()
    return -1 if offset is None else int(offset)


def write_at(fd: int, values: npt.NDArray[Any], offset: int) -> None:
    """Write all bytes of a C-contiguous array at a file offset.

    Raises:
        OSError: the operating system refused, for example because the disk is full.
    """
    view = values.reshape(-1).view(np.uint8).data
    while len(view):
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def seal(file: Any, fd: int, rows: Iterable[tuple[object, ...]], manifest: bytes) -> None:
    """Write index, manifest and attributes, close the file and make it durable.

    Args:
        file: the open low-level file.
        fd: a descriptor of the same file.
        rows: index rows in `index.SCHEMA` order.
        manifest: the run's manifest as JSON bytes.
    """
    index = encode(to_table(rows))
    _write_bytes(file, fd, INDEX_DATASET, index)
    _write_bytes(file, fd, MANIFEST_DATASET, manifest)
    _write_attribute(file, "tensorsleuth_format", np.array(FORMAT_VERSION))
    _write_attribute(file, "index_checksum", np.array(xxhash.xxh3_128_hexdigest(index).encode()))
    h5f.flush(file)
    file.close()
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_bytes(file: Any, fd: int, name: str, data: bytes) -> None:
    """Write past HDF5: when the disk is full, its buffered write would fail unnoticed as the dataset closes."""
    offset = create_tensor(file, name, "uint8", (len(data),), creation_properties())
    if data:
        write_at(fd, np.frombuffer(data, np.uint8), offset)


def _write_attribute(file: Any, name: str, value: npt.NDArray[Any]) -> None:
    attribute = h5a.create(file, name.encode(), h5t.py_create(value.dtype), h5s.create(h5s.SCALAR))
    attribute.write(value)
