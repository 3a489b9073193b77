"""Rebuilding a catalog from the shards, exporting it to Parquet, and merging in another trace."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb

from . import catalog
from .calibrations import enter_calibrations
from .errors import FormatError, InputError, IntegrityError, RunExistsError, SleuthError
from .integrity import verify_shard
from .manifest import check_run_name, write_manifest
from .progress import Progress, no_progress
from .trace import Trace


def index(trace: Trace, *, rebuild: bool = False, progress: Progress = no_progress) -> dict[str, int]:
    """Enter runs on disk into the catalog: those it lacks, or, when rebuilding, all of them into a new one.

    A rebuilt catalog keeps the comparisons of the old one if that can still be read.

    Returns:
        Number of tensors per run entered.
    """
    if not rebuild:
        known = set()
        if trace.catalog_path.exists():
            known = set(trace.query("SELECT run FROM runs").column("run").to_pylist())
        missing = [run for run in trace.run_names() if run not in known]
        counts = {}
        for run in missing:
            progress(run)
            counts[run] = trace.ingest(run)
        return counts
    fresh = trace.catalog_path.with_suffix(".duckdb.rebuilding")
    fresh.unlink(missing_ok=True)
    counts = {}
    with catalog.writing(fresh) as connection:
        for run in trace.run_names():
            progress(run)
            counts[run] = catalog.ingest_run(connection, trace.path, trace.manifest(run), trace.shards(run))
        _keep_comparisons(connection, trace.catalog_path)
        enter_calibrations(connection, trace)
    _wait_until_unlocked(trace.catalog_path)
    fresh.rename(trace.catalog_path)
    return counts


def export(trace: Trace, folder: Path, *, tables: Sequence[str] = ()) -> dict[str, int]:
    """Write catalog tables as Parquet files, one per table.

    Args:
        trace: the trace.
        folder: where the files go; made if needed.
        tables: names of tables; all when empty.

    Returns:
        Number of rows per table.

    Raises:
        InputError: there is no such table.
    """
    import pyarrow.parquet as pq

    known = (*catalog.RUN_TABLES, *catalog.COMPARISON_TABLES)
    if unknown := sorted(set(tables) - set(known)):
        raise InputError(f"no table {', '.join(unknown)}; tables: {', '.join(known)}")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for table in tables or known:
        with catalog.reading(trace.catalog_path) as connection:
            rows = connection.table(table).to_arrow_table()
        pq.write_table(rows, folder / f"{table}.parquet")
        counts[table] = rows.num_rows
    return counts


def merge(
    trace: Trace,
    other: Trace,
    *,
    runs: Sequence[str] = (),
    prefix: str = "",
    progress: Progress = no_progress,
) -> dict[str, int]:
    """Copy runs of a trace captured elsewhere, verifying every checksum on the way.

    Args:
        trace: the trace that receives them.
        other: the trace they come from; it is left as it is.
        runs: names of runs; all when empty.
        prefix: put before each run's name, to avoid clashes.
        progress: called with the name of each shard.

    Returns:
        Number of tensors per run, by its new name.

    Raises:
        RunExistsError: a name is taken; nothing has been copied.
        IntegrityError: a shard is damaged; its run is not merged.
    """
    chosen = list(runs) or other.run_names()
    manifests = {run: other.manifest(run) for run in chosen}
    for run in chosen:
        name = check_run_name(prefix + run)
        if trace.run_folder(name).exists():
            raise RunExistsError(f"{trace.path} already has a run {name!r}; merge with --prefix")
        if manifests[run].status == "running":
            raise InputError(f"run {run!r} of {other.path} is unfinished; run 'sleuth repair {other.path}' first")
    counts = {}
    for run, manifest in manifests.items():
        begun = trace.begin_run(replace(manifest, run=prefix + run))
        folder = trace.run_folder(begun.run)
        try:
            for shard in other.shards(run):
                progress(f"{run}/{shard.name}")
                shutil.copy2(shard, folder / shard.name)
                verify_shard(folder / shard.name)
        except (IntegrityError, SleuthError, OSError):
            shutil.rmtree(folder)
            raise
        write_manifest(folder, replace(begun, status=manifest.status))
        counts[begun.run] = trace.ingest(begun.run)
    return counts


def _keep_comparisons(connection: duckdb.DuckDBPyConnection, old: Path) -> None:
    if not old.exists():
        return
    try:
        with catalog.reading(old) as source:
            kept = {table: source.table(table).to_arrow_table() for table in catalog.COMPARISON_TABLES}
    except (FormatError, duckdb.Error):
        return
    for table, rows in kept.items():
        catalog.insert(connection, table, rows)


def _wait_until_unlocked(path: Path) -> None:
    """Hold the old catalog's write lock for a moment, so that no writer loses rows to the rename."""
    if path.exists():
        try:
            with catalog.writing(path):
                pass
        except FormatError:
            pass
    path.with_suffix(".duckdb.wal").unlink(missing_ok=True)
