"""Reading tensor files that came from elsewhere: as data, mapped instead of loaded, and never as code.

A .pt file goes through torch's restricted unpickler, a .npy file without pickles, a .safetensors file through its own
parser. Whatever is wrong with a file is a `FileRefusedError` with the reason, so that the other files go on.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ...store.dtypes import dtype_name
from ...store.errors import InputError
from ..pending import check_storable
from ..slots import tensor_slots

#: File name suffixes that are read.
SUFFIXES = (".pt", ".pth", ".npy", ".safetensors")

#: A tensor may claim more elements than its file holds (an expanded view) up to this size.
EXPANDED_BYTES = 1 << 30
#: Largest pickle inside a .pt file; it holds names and shapes, the values lie beside it.
_PICKLE_BYTES = 64 << 20
_ZIP_MAGIC = b"PK\x03\x04"
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
_UNKNOWN_BYTES = re.compile(r"Unsupported operand|Invalid magic|unpickling stack underflow")


class FileRefusedError(InputError):
    """A file of a dump that cannot be read, or will not be, with the reason."""


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file with their slots (empty for a bare tensor), mapped where the format allows it.

    Raises:
        FileRefusedError: the file is damaged, holds code, or holds no tensor.
    """
    readers = {".npy": _read_numpy, ".safetensors": _read_safetensors}
    found = False
    try:
        for slot, tensor in readers.get(path.suffix, _read_torch)(path):
            found = True
            yield slot, tensor
    except FileRefusedError:
        raise
    except Exception as error:
        raise FileRefusedError(f"cannot be read: {_first_line(error)}") from error
    if not found:
        raise FileRefusedError("holds no tensor")


def check_tensor(tensor: torch.Tensor) -> None:
    """Refuse a tensor without values, or one that the shards cannot hold bit for bit.

    Raises:
        InputError: with the reason.
    """
    if tensor.is_meta:
        raise FileRefusedError("has a shape but no values (a meta tensor)")
    check_storable(tensor)
    if tensor.numel() == 0:
        raise FileRefusedError(f"holds no elements (shape {list(tensor.shape)})")
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > max(held, EXPANDED_BYTES):
        raise FileRefusedError(f"claims {claimed} bytes of values, the file holds {held}")


def _read_torch(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    mapped = _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        message = str(error)
        if "weights" in message.lower() or "Unsupported" in message:
            raise FileRefusedError(_refusal(message)) from error
        raise
    yield from tensor_slots(value)


def _check_archive(path: Path) -> bool:
    """Whether the file is a zip archive that can be mapped; refuses one that would unpack to more than it is."""
    with path.open("rb") as file:
        if file.read(4) != _ZIP_MAGIC:
            return False
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise FileRefusedError("holds compressed records, which torch.save never writes")
            if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_BYTES:
                raise FileRefusedError(f"holds a pickle of {entry.file_size} bytes; tensors do not need one")
    return True


def _refusal(message: str) -> str:
    match = _FORBIDDEN.search(message)
    if match is None and _UNKNOWN_BYTES.search(message):
        return "is not a file that torch.save wrote (damaged, or a pickle of something else); it was not run"
    what = f"its pickle asks for {match[1]}" if match else "its pickle holds more than tensors"
    return f"refused: {what}; only plain tensors are loaded, code is never run"


def _read_numpy(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False, mmap_mode="c")
    except ValueError as error:
        if "object" in str(error).lower():
            raise FileRefusedError("refused: it holds pickled Python objects; only plain arrays are loaded") from error
        raise
    if array.dtype.kind == "V":
        raise FileRefusedError(
            f"has the raw dtype {array.dtype}, which names no number format (NumPy cannot save bfloat16 or FP8); "
            "dump it as .safetensors"
        )
    dtype_name(array.dtype)
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    yield "", torch.from_numpy(native)


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
