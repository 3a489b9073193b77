"""Verifying every checksum of a trace, and salvaging runs whose process died."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .errors import FormatError, IntegrityError, TraceNotFoundError
from .hdf5_file import create_file, create_tensor, creation_properties, seal, sync_folder, write_at
from .index import NO_DATASET, SCHEMA
from .journal import read_journal
from .manifest import RunManifest, read_manifest, write_manifest
from .progress import Progress, no_progress
from .shard_reader import ShardReader, read_seal
from .shard_writer import partial_path
from .trace import Trace, is_locked

_COLUMN = {name: index for index, name in enumerate(SCHEMA.names)}


@dataclass(frozen=True)
class Verification:
    """What `verify` looked at, and what is wrong (one line each)."""

    n_runs: int
    n_shards: int
    n_tensors: int
    nbytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Salvage:
    """What `repair` did with one unfinished shard, or what it could not repair.

    Attributes:
        run: the run.
        shard: the shard, empty when it is about the run.
        n_salvaged, n_damaged: tensors.
        note: what was done, or what is wrong.
        failed: it is still wrong.
    """

    run: str
    shard: str
    n_salvaged: int
    n_damaged: int
    note: str
    failed: bool = False


def verify(trace: Trace, *, progress: Progress = no_progress) -> Verification:
    """Check every manifest, every index and the bytes of every tensor against their checksums."""
    problems: list[str] = []
    n_shards = n_tensors = nbytes = 0
    catalogued = _catalogued(trace, problems)
    for run in trace.run_names():
        try:
            trace.manifest(run)
        except (FormatError, TraceNotFoundError) as error:
            problems.append(str(error))
        unfinished = sorted(trace.run_folder(run).glob("*.journal"))
        problems.extend(f"run {run!r} has an unfinished shard {path.stem}; run 'sleuth repair'" for path in unfinished)
        for path in trace.shards(run):
            progress(f"{run}/{path.name}")
            n_shards += 1
            try:
                tensors, size, checksum = verify_shard(path)
            except (IntegrityError, FormatError) as error:
                problems.append(str(error))
                catalogued.pop((run, path.name), None)
                continue
            n_tensors, nbytes = n_tensors + tensors, nbytes + size
            recorded = catalogued.pop((run, path.name), None)
            if recorded is None:
                problems.append(f"shard {path} is not in the catalog; run 'sleuth index {trace.path}'")
            elif recorded != checksum:
                problems.append(
                    f"shard {path} is not the one in the catalog; run 'sleuth index {trace.path} --rebuild'"
                )
    problems.extend(f"shard {run}/{shard} is in the catalog but not on disk" for run, shard in catalogued)
    return Verification(len(trace.run_names()), n_shards, n_tensors, nbytes, tuple(problems))


def repair(trace: Trace, *, progress: Progress = no_progress) -> list[Salvage]:
    """Salvage every tensor that a dead process had acknowledged, and enter the runs into the catalog.

    Runs that a live process is writing are left alone. Damaged tensors of unfinished shards (none is expected) are
    dropped, never returned; the file is then kept under the suffix `.damaged`. A sealed shard that is damaged, or a
    file of another format version, is reported as failed and left as it is; its run keeps what the catalog had of it,
    and the other runs are repaired all the same. Runs that the catalog holds as they are on disk are not entered again.

    Raises:
        CatalogLockedError: another process holds the catalog.
        OSError: the operating system refused to write.
    """
    salvages: list[Salvage] = []
    for run in trace.run_names():
        folder = trace.run_folder(run)
        if any(is_locked(path) for path in folder.glob("rank*.lock")):
            salvages.append(Salvage(run, "", 0, 0, "being written by a live process: left alone"))
            continue
        try:
            manifest = _manifest_or_sealed(trace, run)
        except (FormatError, IntegrityError) as error:
            salvages.append(Salvage(run, "", 0, 0, str(error), failed=True))
            continue
        if manifest is None and not any(folder.glob("rank*-*")):
            shutil.rmtree(folder)
            salvages.append(Salvage(run, "", 0, 0, "nothing had been recorded: folder removed"))
            continue
        if manifest is None:
            note = "no manifest and no sealed shard: nothing can be salvaged"
            salvages.append(Salvage(run, "", 0, 0, note, failed=True))
            continue
        salvages.extend(_repair_run(trace, run, manifest, progress))
    return salvages


def _repair_run(trace: Trace, run: str, manifest: RunManifest, progress: Progress) -> list[Salvage]:
    """Salvage the unfinished shards of one run, and enter it unless a sealed one is damaged."""
    folder = trace.run_folder(run)
    found: list[Salvage] = []
    for journal in sorted(folder.glob("*.journal")):
        progress(f"{run}/{journal.stem}")
        try:
            found.append(_salvage(run, journal, manifest))
        except (FormatError, IntegrityError) as error:
            found.append(Salvage(run, journal.with_suffix(".h5").name, 0, 0, str(error), failed=True))
    for lock in folder.glob("rank*.lock"):
        lock.unlink()
    if manifest.status == "running":
        write_manifest(folder, replace(manifest, status="repaired"))
    seals = {path.name: _seal_of(path) for path in trace.shards(run)}
    damaged = [Salvage(run, name, 0, 0, str(e), failed=True) for name, e in seals.items() if isinstance(e, Exception)]
    if not damaged and not _is_catalogued(trace, run, seals):
        trace.ingest(run)
    return found + damaged


def _seal_of(path: Path) -> str | FormatError | IntegrityError:
    """The checksum of a sealed shard's index, or what is wrong with the shard."""
    try:
        return read_seal(path)[2]
    except (FormatError, IntegrityError) as error:
        return error


def _is_catalogued(trace: Trace, run: str, seals: Mapping[str, object]) -> bool:
    """Whether the catalog holds a run as it is on disk: the same shards, by the checksums of their indices."""
    manifest = trace.manifest(run)
    try:
        shards = trace.query("SELECT shard, checksum FROM shards WHERE run = ?", [run]).to_pylist()
        runs = trace.query("SELECT ordinal, status FROM runs WHERE run = ?", [run]).to_pylist()
    except (TraceNotFoundError, FormatError):
        return False
    same = {row["shard"]: row["checksum"] for row in shards} == seals
    return same and runs == [{"ordinal": manifest.ordinal, "status": manifest.status}]


def verify_shard(path: Path) -> tuple[int, int, str]:
    """Check one sealed shard; returns its number of tensors, their stored bytes and the index checksum.

    Raises:
        IntegrityError: bytes do not match a checksum.
        FormatError: the shard is of another format version.
    """
    table, _, checksum = read_seal(path)
    done: set[tuple[int, int]] = set()
    nbytes = 0
    with ShardReader(path) as reader:
        columns = table.select(["dataset", "file_offset", "nbytes", "checksum", "seq"]).to_pydict()
        for dataset, offset, size, expected, seq in zip(*columns.values(), strict=True):
            if dataset == NO_DATASET or (offset, size) in done:
                continue
            done.add((offset, size))
            nbytes += size
            if reader.checksum(offset, size) != expected:
                raise IntegrityError(
                    f"shard {path}: tensor {seq} ({dataset}) does not match its checksum; the file is damaged"
                )
            reader.release_pages()
    return table.num_rows, nbytes, checksum


def _catalogued(trace: Trace, problems: list[str]) -> dict[tuple[str, str], str]:
    try:
        rows = trace.query("SELECT run, shard, checksum FROM shards").to_pylist()
    except (TraceNotFoundError, FormatError) as error:
        if trace.run_names():
            problems.append(str(error))
        return {}
    return {(row["run"], row["shard"]): row["checksum"] for row in rows}


def _manifest_or_sealed(trace: Trace, run: str) -> RunManifest | None:
    """The run's manifest, restored from its newest sealed shard when `run.json` is gone or unreadable."""
    folder = trace.run_folder(run)
    try:
        return read_manifest(folder)
    except (TraceNotFoundError, FormatError):
        for path in reversed(trace.shards(run)):
            _, data, _ = read_seal(path)
            found = RunManifest.from_json(data, str(path))
            # A merged run carries the name and the ordinal it had elsewhere.
            manifest = replace(found, run=run, ordinal=trace.free_ordinal(found.ordinal))
            write_manifest(folder, manifest)
            return manifest
    return None


def _salvage(run: str, journal: Path, manifest: RunManifest) -> Salvage:
    shard = journal.with_suffix(".h5")
    partial = partial_path(shard)
    header, rows = read_journal(journal)
    if shard.exists():
        verify_shard(shard)
        if partial.exists():  # an earlier repair died right after salvaging it
            partial.rename(partial.with_suffix(".damaged"))
        journal.unlink()
        return Salvage(run, shard.name, len(rows), 0, "had been sealed: journal removed")
    if header is None or not rows or not partial.exists():
        partial.unlink(missing_ok=True)
        journal.unlink()
        return Salvage(run, shard.name, 0, 0, "nothing had been acknowledged")
    good, damaged = _reseal(partial, shard, rows, manifest.to_json())
    if damaged:
        partial.rename(partial.with_suffix(".damaged"))
    else:
        partial.unlink()
    journal.unlink()
    return Salvage(run, shard.name, good, damaged, "salvaged")


def _reseal(partial: Path, shard: Path, rows: list[tuple[Any, ...]], manifest: bytes) -> tuple[int, int]:
    """Copy the acknowledged tensors of an unfinished shard into a sealed one."""
    temporary = shard.with_suffix(".salvage")
    temporary.unlink(missing_ok=True)
    file = create_file(temporary)
    fd = os.open(temporary, os.O_RDWR)
    try:
        kept = list(_copy_tensors(partial, file, fd, rows))
        seal(file, fd, kept, manifest)
    finally:
        os.close(fd)
    temporary.rename(shard)
    sync_folder(shard.parent)
    return len(kept), len(rows) - len(kept)


def _copy_tensors(partial: Path, file: Any, fd: int, rows: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    creation = creation_properties()
    copied: dict[str, int | None] = {}
    with partial.open("rb") as source:
        for row in rows:
            values = dict(zip(SCHEMA.names, row, strict=True))
            name, offset, size = values["dataset"], values["file_offset"], values["nbytes"]
            if name == NO_DATASET:
                yield row
                continue
            if name not in copied:
                data = os.pread(source.fileno(), size, offset) if size else b""
                copied[name] = None
                if xxhash.xxh3_128_hexdigest(data) == values["checksum"]:
                    place = create_tensor(file, name, values["dtype"], tuple(values["shape"]), creation)
                    write_at(fd, np.frombuffer(data, np.uint8), max(place, 0))
                    copied[name] = place
            moved = copied[name]
            if moved is not None:
                yield (*row[: _COLUMN["file_offset"]], moved, *row[_COLUMN["file_offset"] + 1 :])
