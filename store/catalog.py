"""The DuckDB catalog of a trace: opening it for reading or writing, and ingesting runs.

DuckDB lets one process write, and locks every other one out meanwhile, readers too. So the write lock is held
only while rows are ingested, and everybody else waits a while before saying who holds it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from .errors import CatalogLockedError, FormatError, StorageError, TraceNotFoundError
from .manifest import RunManifest
from .shard_reader import read_seal

SCHEMA_VERSION = 1
CATALOG_FILE = "catalog.duckdb"
#: Seconds to wait for another process that holds the catalog.
LOCK_TIMEOUT = 30.0
#: Written so that DuckDB 1.4 and later read it.
STORAGE_VERSION = "v1.0.0"

#: Tables that rebuild from runs/, and tables that compare fills.
RUN_TABLES = ("runs", "prompts", "tokens", "modules", "shards", "tensors")
COMPARISON_TABLES = (
    "mappings",
    "mapping_entries",
    "comparisons",
    "coverage",
    "measurements",
    "error_quantiles",
    "token_errors",
    "logits",
    "logit_criteria",
    "change_points",
    "suspects",
    "findings",
    "calibrations",
)
_RUN_ID, _RANK_ID = 10**12, 10**8
_HOLDER = re.compile(r"PID (\d+)")


@contextmanager
def reading(path: Path, *, timeout: float = LOCK_TIMEOUT, external_access: bool = False) -> Iterator[Any]:
    """A read-only connection, without access to the file system or network unless `external_access` is set.

    Raises:
        TraceNotFoundError: there is no catalog.
        CatalogLockedError: another process was writing for longer than the timeout.
        FormatError: the catalog has an unknown schema version.
    """
    if not path.exists():
        raise TraceNotFoundError(f"{path} does not exist; build it with 'sleuth index {path.parent}'")
    connection = _connect(path, read_only=True, timeout=timeout)
    try:
        _check_version(connection, path)
        if not external_access:
            connection.execute("SET enable_external_access = false")
        connection.execute("SET python_enable_replacements = false")
        yield connection
    finally:
        connection.close()


@contextmanager
def writing(path: Path, *, timeout: float = LOCK_TIMEOUT) -> Iterator[Any]:
    """A writing connection inside one transaction: committed on success, rolled back on an exception.

    The catalog is created if it does not exist.

    Raises:
        CatalogLockedError: another process held the catalog for longer than the timeout.
        FormatError: the catalog has an unknown schema version.
        StorageError: the operating system refused to write.
    """
    if not path.exists():
        _create(path)
    connection = _connect(path, read_only=False, timeout=timeout)
    try:
        connection.execute("BEGIN")
        _check_version(connection, path)
        yield connection
        connection.execute("COMMIT")
    except (duckdb.IOException, duckdb.TransactionException) as error:
        raise _storage_error(path, error) from error
    finally:
        connection.close()


def _create(path: Path) -> None:
    """Make an empty catalog that appears at once or not at all, whenever the process dies."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        connection = _connect(fresh, read_only=False, timeout=0)
        try:
            create_tables(connection)
            connection.execute("CHECKPOINT")
        finally:
            connection.close()
        path.with_name(f"{path.name}.wal").unlink(missing_ok=True)
        with suppress(FileExistsError):
            os.link(fresh, path)
    except duckdb.Error as error:
        raise _storage_error(path, error) from error
    finally:
        fresh.unlink(missing_ok=True)
        fresh.with_name(f"{fresh.name}.wal").unlink(missing_ok=True)


def create_tables(connection: Any) -> None:
    """Create every table of the current schema in an empty catalog."""
    from .. import __version__

    connection.execute((files(__package__) / "schema.sql").read_text())
    connection.execute("INSERT INTO catalog_info VALUES (?, ?)", [SCHEMA_VERSION, f"tensorsleuth {__version__}"])


def ingest_run(connection: Any, folder: Path, manifest: RunManifest, shards: list[Path]) -> int:
    """Enter one run into the catalog, replacing what was there under its name.

    Args:
        connection: a writing connection.
        folder: the trace's folder; shard paths are stored relative to it.
        manifest: the run's manifest.
        shards: its sealed shards.

    Returns:
        The number of tensors.

    Raises:
        FormatError, IntegrityError: a shard cannot be read.
    """
    forget_run(connection, manifest.run)
    _insert_manifest(connection, manifest)
    n_tensors = 0
    for path in shards:
        rank = rank_of(path)
        table, _, checksum = read_seal(path)
        insert(
            connection,
            "shards",
            {
                "run": [manifest.run],
                "rank": [rank],
                "shard": [path.name],
                "path": [path.relative_to(folder).as_posix()],
                "bytes": [path.stat().st_size],
                "checksum": [checksum],
                "n_tensors": [table.num_rows],
                "state": ["sealed"],
            },
        )
        connection.register("shard_index", table)
        connection.execute(
            """INSERT INTO tensors BY NAME
               SELECT ?::BIGINT + seq AS tensor_id, ? AS run, ?::INTEGER AS rank, ? AS shard, * FROM shard_index""",
            [manifest.ordinal * _RUN_ID + rank * _RANK_ID, manifest.run, rank, path.name],
        )
        connection.unregister("shard_index")
        n_tensors += table.num_rows
    return n_tensors


def forget_run(connection: Any, run: str) -> None:
    """Delete the rows of a run; its shards stay, and so do comparisons with it."""
    for table in RUN_TABLES:
        connection.execute(f"DELETE FROM {table} WHERE run = ?", [run])  # noqa: S608 (fixed names)


def forget_comparison(connection: Any, comparison: str) -> None:
    """Delete a comparison with everything that was measured for it."""
    for table in COMPARISON_TABLES:
        key = "mapping" if table in ("mappings", "mapping_entries") else "comparison"
        if table != "calibrations":
            connection.execute(f"DELETE FROM {table} WHERE {key} = ?", [comparison])  # noqa: S608 (fixed names)


def rank_of(shard: Path) -> int:
    """The rank that wrote a shard, from its file name."""
    match = re.fullmatch(r"rank(\d+)-(\d+)\.h5", shard.name)
    if match is None:
        raise FormatError(f"{shard} is not named like a shard (rank<r>-<n>.h5); move it out of the trace")
    return int(match[1])


def insert(connection: Any, table: str, columns: dict[str, Any] | pa.Table) -> None:
    """Append rows in bulk through Arrow; columns are matched by name."""
    data = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if data.num_rows == 0:
        return
    connection.register("incoming", data)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")  # noqa: S608 (fixed names)
    connection.unregister("incoming")


def _insert_manifest(connection: Any, manifest: RunManifest) -> None:
    import json

    connection.execute(
        "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            manifest.run,
            manifest.ordinal,
            manifest.role,
            manifest.stack,
            manifest.model,
            manifest.dtype,
            manifest.device,
            manifest.tp,
            manifest.status,
            datetime.fromisoformat(manifest.created_at).astimezone(timezone.utc).replace(tzinfo=None),
            json.dumps(manifest.provenance, ensure_ascii=False),
        ],
    )
    run = manifest.run
    insert(
        connection,
        "prompts",
        {
            "run": [run] * len(manifest.prompts),
            "prompt": pa.array([p.prompt for p in manifest.prompts], pa.int32()),
            "id": pa.array([p.id for p in manifest.prompts], pa.string()),
            "text": pa.array([p.text for p in manifest.prompts], pa.string()),
            "n_tokens": pa.array([p.n_tokens for p in manifest.prompts], pa.int32()),
        },
    )
    rows = [
        (t.prompt, position, token, t.forced_from is not None and position >= t.forced_from)
        for t in manifest.tokens
        for position, token in enumerate(t.token_ids)
    ]
    insert(
        connection,
        "tokens",
        {
            "run": [run] * len(rows),
            "prompt": pa.array([row[0] for row in rows], pa.int32()),
            "position": pa.array([row[1] for row in rows], pa.int32()),
            "token_id": pa.array([row[2] for row in rows], pa.int32()),
            "forced": pa.array([row[3] for row in rows], pa.bool_()),
        },
    )
    modules = manifest.modules
    insert(
        connection,
        "modules",
        {
            "run": [run] * len(modules),
            "path": pa.array([m.path for m in modules], pa.string()),
            "class": pa.array([m.cls for m in modules], pa.string()),
            "parent": pa.array([m.parent for m in modules], pa.string()),
            "depth": pa.array([m.depth for m in modules], pa.int32()),
            "exec_order": pa.array([m.exec_order for m in modules], pa.int32()),
            "n_parameters": pa.array([m.n_parameters for m in modules], pa.int64()),
        },
    )


def _connect(path: Path, *, read_only: bool, timeout: float) -> Any:
    config = {} if read_only else {"storage_compatibility_version": STORAGE_VERSION}
    deadline = time.monotonic() + timeout
    delay = 0.02
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only, config=config)
        except duckdb.ConnectionException as error:
            raise CatalogLockedError(
                f"{path} is already open in this process in another mode; close that connection first"
            ) from error
        except duckdb.IOException as error:
            if "No space left" in str(error):
                raise _storage_error(path, error) from error
            if "lock" not in str(error):
                raise FormatError(
                    f"{path} cannot be opened as a DuckDB catalog ({str(error).splitlines()[0]}); "
                    f"rebuild it with 'sleuth index {path.parent} --rebuild'"
                ) from error
            if time.monotonic() >= deadline:
                holder = _HOLDER.search(str(error))
                who = f"process {holder[1]}" if holder else "another process"
                raise CatalogLockedError(
                    f"{path} is held for writing by {who}; wait for it to finish and try again"
                ) from error
        time.sleep(delay)
        delay = min(delay * 1.5, 0.5)


def _storage_error(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be written ({str(error).splitlines()[0]}); the runs are safe: free space, then "
        f"'sleuth index {path.parent}'"
    )


def _check_version(connection: Any, path: Path) -> None:
    try:
        rows = connection.execute("SELECT schema_version FROM catalog_info").fetchall()
    except duckdb.CatalogException:
        rows = []
    found = rows[0][0] if rows else "none"
    if found != SCHEMA_VERSION:
        raise FormatError(
            f"{path} has catalog schema version {found}, this tensorsleuth knows {SCHEMA_VERSION}; "
            f"rebuild it from the shards with 'sleuth index {path.parent} --rebuild'"
        )
