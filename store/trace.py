"""A trace on disk: its runs, its catalog and the values of its tensors."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pyarrow as pa

from . import catalog
from .errors import CatalogLockedError, FormatError, InputError, RunExistsError, TraceNotFoundError
from .index import NO_DATASET
from .located import LocatedTensors
from .manifest import RunManifest, check_run_name, read_manifest, write_manifest
from .shard_reader import ShardReader

if TYPE_CHECKING:
    from typing_extensions import Self

_RUNS = "runs"
_OPEN_SHARDS = 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the catalog and its values.

    Attributes:
        tensor_id: its id.
        site: module path, with port and slot where they say something.
        dims: axes, see `store.dims`.
        position_start: first token position covered, or None.
        values: the stored values, a read-only view of the shard.
    """

    tensor_id: int
    site: str
    dims: str
    position_start: int | None
    values: npt.NDArray[Any]


def site_name(module: str, port: str, slot: str, call: int = 0) -> str:
    """The name of a site: `layers.0.self_attn[1]`, `lm_head:input`, `(root)[logits]`, `mlp#1` for its second call."""
    name = module or "(root)"
    if call:
        name += f"#{call}"
    if port != "output":
        name += f":{port}"
    if slot:
        name += f"[{slot}]"
    return name


class Trace:
    """A trace directory. Cheap to open: nothing is read until it is asked for."""

    def __init__(self, path: Path) -> None:
        """Use `Trace.open` or `Trace.create`."""
        self.path = path
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._located = LocatedTensors(self.catalog_path, self.query)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open an existing trace.

        Raises:
            TraceNotFoundError: the folder holds no trace.
        """
        folder = Path(path)
        if not (folder / _RUNS).is_dir():
            raise TraceNotFoundError(
                f"{folder} holds no trace (no {_RUNS}/ in it); name a folder that 'sleuth capture' wrote"
            )
        return cls(folder)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Open a trace, making an empty one if the folder is new or empty.

        Raises:
            InputError: the path is a file, or a folder with something else in it.
        """
        folder = Path(path)
        if folder.is_dir() and not (folder / _RUNS).is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no trace; name a new folder for the trace")
        try:
            (folder / _RUNS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"no trace can be made at {folder}: {error.strerror}; name another folder") from error
        return cls(folder)

    @property
    def catalog_path(self) -> Path:
        """The DuckDB file."""
        return self.path / catalog.CATALOG_FILE

    # Runs on disk

    def run_folder(self, run: str) -> Path:
        """The folder of a run, whether or not it exists."""
        return self.path / _RUNS / check_run_name(run)

    def run_names(self) -> list[str]:
        """Names of all run folders, in the order in which the runs were made."""
        folders = [entry for entry in (self.path / _RUNS).iterdir() if entry.is_dir()]
        return [folder.name for folder in sorted(folders, key=_run_order)]

    def manifest(self, run: str) -> RunManifest:
        """The manifest of a run.

        Raises:
            TraceNotFoundError: the trace has no such run.
            FormatError: the manifest is of another format version.
        """
        folder = self.run_folder(run)
        if not folder.is_dir():
            known = ", ".join(self.run_names()) or "none"
            raise TraceNotFoundError(f"{self.path} has no run {run!r}; its runs: {known}")
        return read_manifest(folder)

    def shards(self, run: str) -> list[Path]:
        """Sealed shards of a run, by rank and number."""
        paths = self.run_folder(run).glob("rank*-*.h5")
        return sorted(paths, key=lambda path: (catalog.rank_of(path), int(path.stem.rpartition("-")[2])))

    def begin_run(self, manifest: RunManifest) -> RunManifest:
        """Make the folder of a new run and write its first manifest.

        Args:
            manifest: its `ordinal` is assigned here.

        Returns:
            The manifest as written, with status `running`.

        Raises:
            RunExistsError: the name is taken.
        """
        folder = self.run_folder(manifest.run)
        with self._ordinals():
            try:
                folder.mkdir()
            except FileExistsError:
                raise RunExistsError(self._taken(manifest.run)) from None
            manifest = replace(manifest, ordinal=self._next_ordinal(), status="running")
            write_manifest(folder, manifest)
        return manifest

    def finish_run(self, manifest: RunManifest, *, timeout: float = catalog.LOCK_TIMEOUT) -> int:
        """Write the final manifest and enter the run into the catalog.

        Returns:
            The number of tensors ingested.

        Raises:
            CatalogLockedError: the catalog is held; the run is safe, `sleuth index` enters it later.
        """
        write_manifest(self.run_folder(manifest.run), manifest)
        try:
            return self.ingest(manifest.run, timeout=timeout)
        except CatalogLockedError as error:
            raise CatalogLockedError(
                f"{error}; run {manifest.run!r} is safe on disk: enter it later with 'sleuth index {self.path}'"
            ) from error

    def ingest(self, run: str, *, timeout: float = catalog.LOCK_TIMEOUT) -> int:
        """Enter a run on disk into the catalog, replacing what was there under its name."""
        manifest, shards = self.manifest(run), self.shards(run)
        with catalog.writing(self.catalog_path, timeout=timeout) as connection:
            return catalog.ingest_run(connection, self.path, manifest, shards)

    def remove_run(self, run: str, *, timeout: float = catalog.LOCK_TIMEOUT) -> None:
        """Delete a run for good: its rows in the catalog and its shards. Views of its tensors stay valid.

        Raises:
            CatalogLockedError: the catalog is held; nothing was deleted.
        """
        folder = self.run_folder(run)
        with catalog.writing(self.catalog_path, timeout=timeout) as connection:
            catalog.forget_run(connection, run)
        for shard in self.shards(run):
            self._readers.pop(shard.relative_to(self.path).as_posix(), None)
        shutil.rmtree(folder)

    @contextmanager
    def _ordinals(self) -> Iterator[None]:
        fd = os.open(self.path / _RUNS / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def free_ordinal(self, wanted: int) -> int:
        """The wanted ordinal, or a new one if a run has it."""
        return self._next_ordinal() if wanted in self._known_ordinals() else wanted

    def _next_ordinal(self) -> int:
        return max(self._known_ordinals(), default=0) + 1

    def _known_ordinals(self) -> list[int]:
        ordinals = [_run_order(self.path / _RUNS / name)[0] for name in self.run_names()]
        return [ordinal for ordinal in ordinals if ordinal < _UNKNOWN_ORDINAL]

    def _taken(self, run: str) -> str:
        folder = self.run_folder(run)
        live = any(is_locked(path) for path in folder.glob("rank*.lock"))
        if live:
            return f"run {run!r} is being written by another process; wait for it, or choose another --run name"
        if any(folder.glob("*.journal")):
            return (
                f"run {run!r} was interrupted; salvage it with 'sleuth repair {self.path}', choose another --run name"
            )
        return f"{self.path} already has a run {run!r}; choose another --run name, or remove {folder}"

    # The catalog

    def query(self, sql: str, parameters: list[Any] | None = None) -> pa.Table:
        """Run one read-only SQL statement and return its rows.

        Raises:
            TraceNotFoundError, CatalogLockedError, FormatError: see `catalog.reading`.
        """
        with catalog.reading(self.catalog_path) as connection:
            return connection.sql(sql, params=parameters or []).to_arrow_table()

    # Values

    def tensor(self, tensor_id: int) -> StoredTensor:
        """A tensor by its id.

        Raises:
            TraceNotFoundError: there is no such tensor.
            InputError: it was captured as statistics only.
        """
        row = self._located.find(tensor_id)
        if row is None:
            raise TraceNotFoundError(f"{self.path} has no tensor {tensor_id}; 'sleuth tensors {self.path}' lists them")
        site = site_name(row["module"], row["port"], row["slot"], row["call"])
        if row["dataset"] == NO_DATASET:
            raise InputError(
                f"tensor {tensor_id} ({site}) was captured as statistics only; capture the run with values"
            )
        values = self.values(row["path"], row["dtype"], tuple(row["shape"]), row["file_offset"], row["nbytes"])
        return StoredTensor(tensor_id, site, row["dims"], row["position_start"], values)

    def values(self, shard: str, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> npt.NDArray[Any]:
        """Stored values as a read-only, zero-copy view of a shard.

        Args:
            shard: path of the shard relative to the trace, as in the `shards` table.
            dtype: torch dtype name.
            shape: axis lengths.
            offset: byte offset of the values.
            nbytes: their size.

        Raises:
            IntegrityError: the shard is missing or truncated.
        """
        return self._reader(shard).array(dtype, shape, offset, nbytes)

    def release_pages(self) -> None:
        """Drop mapped pages from resident memory; views stay valid and read again when used."""
        for reader in self._readers.values():
            reader.release_pages()

    def _reader(self, shard: str) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = ShardReader(self.path / shard)
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader


_UNKNOWN_ORDINAL = 1 << 40


def _run_order(folder: Path) -> tuple[int, str]:
    try:
        return read_manifest(folder).ordinal, folder.name
    except (TraceNotFoundError, FormatError):
        return _UNKNOWN_ORDINAL, folder.name


def is_locked(path: Path) -> bool:
    """Whether a live process holds the advisory lock of a rank."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
