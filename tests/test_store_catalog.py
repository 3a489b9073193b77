"""The catalog is derived, versioned and locked: it can be rebuilt, and says who holds it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from tensorsleuth.capture.layout import Row, StepLayout
from tensorsleuth.capture.recorder import record
from tensorsleuth.store import (
    CatalogLockedError,
    FormatError,
    InputError,
    IntegrityError,
    Prompt,
    PromptTokens,
    RunExistsError,
    Trace,
    TraceNotFoundError,
    export,
    index,
    merge,
    repair,
    verify,
)
from tensorsleuth.store import catalog as catalogs
from tensorsleuth.store.catalog import COMPARISON_TABLES, RUN_TABLES
from tensorsleuth.store.manifest import write_manifest


def capture(trace: Trace, run: str, value: float = 0.0) -> None:
    """A run with prompts, tokens, two shards, an empty tensor, a scalar and a NaN."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    layout = StepLayout("prefill", 0, 1, 3, (Row(0, 0, 0, 3, 0),))
    with (
        torch.no_grad(),
        record(
            trace,
            model,
            run=run,
            role="reference",
            prompts=[Prompt(0, "first", "Zoë said \"'hi'\"", 2), Prompt(1, "second", None, 1)],
            tokens=lambda: [PromptTokens(0, (5, 6, 7), forced_from=2), PromptTokens(1, (9,))],
            shard_bytes=200,
        ) as recorder,
    ):
        with recorder.step(layout):
            model(torch.full((1, 3, 4), value))
        model[1](torch.full((), torch.nan))
        model[1](torch.empty(0, 4))


@pytest.fixture
def filled(trace: Trace) -> Trace:
    """Two runs and one row in every comparison table."""
    capture(trace, "a", 1.0)
    capture(trace, "b", 2.0)
    with catalogs.writing(trace.catalog_path) as connection:
        for table in COMPARISON_TABLES:
            columns = connection.execute(f"DESCRIBE {table}").fetchall()
            values = ", ".join(EXAMPLES[column[1]] for column in columns)
            connection.execute(f"INSERT INTO {table} VALUES ({values})")
    return trace


EXAMPLES = {
    "VARCHAR": "'text'",
    "JSON": "'{\"a\": 1}'",
    "INTEGER": "1",
    "BIGINT": "2",
    "DOUBLE": "0.5",
    "BOOLEAN": "true",
    "VARCHAR[]": "['x', 'y']",
    "TIMESTAMP": "'2026-01-02 03:04:05.678'",
}


def contents(trace: Trace) -> dict[str, pa.Table]:
    return {table: trace.query(f"SELECT * FROM {table} ORDER BY ALL") for table in (*RUN_TABLES, *COMPARISON_TABLES)}


def test_a_rebuilt_catalog_has_the_same_rows(filled: Trace) -> None:
    before = contents(filled)
    assert all(table.num_rows for table in before.values())
    filled.catalog_path.unlink()
    index(filled)
    after = contents(filled)
    for table in RUN_TABLES:
        assert after[table].equals(before[table]), table


def test_rebuilding_keeps_the_comparisons(filled: Trace) -> None:
    before = contents(filled)
    assert index(filled, rebuild=True) == {"a": 7, "b": 7}
    for table, rows in contents(filled).items():
        assert rows.equals(before[table]), table
    assert verify(filled).problems == ()
    assert [path.name for path in filled.path.iterdir() if path.is_file()] == ["catalog.duckdb"]


def test_repairing_a_sound_trace_changes_no_row(filled: Trace) -> None:
    before = contents(filled)
    repair(filled)
    for table, rows in contents(filled).items():
        assert rows.equals(before[table]), table


def test_a_catalog_that_is_damaged_is_refused_and_rebuilt(filled: Trace) -> None:
    filled.catalog_path.write_bytes(b"nothing that DuckDB knows" * 1000)
    with pytest.raises(FormatError, match=r"cannot be opened as a DuckDB catalog .*'sleuth index .* --rebuild'"):
        filled.query("SELECT 1")
    index(filled, rebuild=True)
    assert verify(filled).problems == ()


def test_a_log_left_behind_by_a_killed_writer_does_not_spoil_a_new_catalog(filled: Trace) -> None:
    log = filled.path / "catalog.duckdb.wal"
    script = (
        "import duckdb, os, signal, sys\n"
        "c = duckdb.connect(sys.argv[1], config={'storage_compatibility_version': 'v1.0.0'})\n"
        "c.execute('SET wal_autocheckpoint = \\'1GB\\'')\n"
        "c.execute('CREATE TABLE other AS SELECT range AS x FROM range(1000)')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(filled.catalog_path)], check=False)
    assert log.exists()
    assert filled.query("SELECT count(*) AS n FROM other").column(0).to_pylist() == [1000]
    filled.catalog_path.unlink()
    index(filled)
    assert verify(filled).problems == ()
    subprocess.run([sys.executable, "-c", script, str(filled.catalog_path)], check=False)
    filled.catalog_path.write_bytes(b"damaged")
    index(filled, rebuild=True)
    assert not log.exists()
    assert verify(filled).problems == ()


@pytest.mark.parametrize("use", [lambda t: t.query("SELECT 1"), lambda t: t.ingest("a"), index, verify])
def test_a_catalog_of_an_unknown_schema_version_is_refused(filled: Trace, use: Callable[[Trace], Any]) -> None:
    with duckdb.connect(str(filled.catalog_path)) as connection:
        connection.execute("UPDATE catalog_info SET schema_version = 7")
    message = "has catalog schema version 7, this tensorsleuth knows 1; rebuild it .*'sleuth index .* --rebuild'"
    if use is verify:
        assert any("catalog schema version 7" in problem for problem in verify(filled).problems)
    else:
        with pytest.raises(FormatError, match=message):
            use(filled)
    index(filled, rebuild=True)
    assert verify(filled).problems == ()


def test_a_database_that_is_no_catalog_is_refused(filled: Trace) -> None:
    filled.catalog_path.unlink()
    duckdb.connect(str(filled.catalog_path)).close()
    with pytest.raises(FormatError, match="schema version none"):
        filled.query("SELECT 1")


def test_older_duckdb_versions_can_read_the_catalog(filled: Trace) -> None:
    with duckdb.connect(str(filled.catalog_path), read_only=True) as connection:
        (tags,) = connection.execute("SELECT tags FROM duckdb_databases() WHERE NOT internal").fetchone() or (None,)
    header = filled.catalog_path.read_bytes()[:4096]
    assert b"DUCK" in header
    assert int.from_bytes(header[12:20], "little") == 64, tags  # the storage version that DuckDB 1.0 wrote


HOLD = (
    "import sys, tensorsleuth.store.catalog as c, pathlib\n"
    "with c.writing(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


@pytest.fixture
def holder(filled: Trace) -> Any:
    """Another process that holds the catalog for writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(filled.catalog_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.communicate()


def test_a_catalog_held_by_another_process_names_it(
    filled: Trace, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = f"is held for writing by process {holder.pid}; wait for it to finish"
    with pytest.raises(CatalogLockedError, match=message), catalogs.reading(filled.catalog_path, timeout=0.1):
        pass
    with pytest.raises(CatalogLockedError, match=message):
        filled.ingest("a", timeout=0.1)
    connect = catalogs._connect
    monkeypatch.setattr(catalogs, "_connect", lambda path, **options: connect(path, **{**options, "timeout": 0.1}))
    with pytest.raises(CatalogLockedError, match=message):
        index(filled, rebuild=True)
    holder.communicate()
    before = contents(filled)
    index(filled, rebuild=True)
    assert contents(filled)["comparisons"].equals(before["comparisons"])


def test_waiting_for_a_catalog_that_is_released_in_time(filled: Trace, holder: Any) -> None:
    holder.stdin.close()
    holder.stdin = None
    assert filled.query("SELECT count(*) AS n FROM runs").column(0).to_pylist() == [2]


def test_queries_cannot_write_or_reach_files(filled: Trace, tmp_path: Path) -> None:
    with pytest.raises(duckdb.Error):
        filled.query("DELETE FROM runs")
    with pytest.raises(duckdb.Error):
        filled.query(f"SELECT * FROM read_text('{tmp_path}/../*')")
    with pytest.raises(duckdb.Error):
        filled.query("SET enable_external_access = true")
    assert filled.query("SELECT count(*) AS n FROM runs WHERE run = ?", ["a"]).column(0).to_pylist() == [1]


def test_times_are_kept_in_utc(filled: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(filled.manifest("a"), created_at="2026-03-01T12:00:00.250000+09:00")
    write_manifest(filled.run_folder("a"), manifest)
    script = "import sys, tensorsleuth.store as s; s.Trace.open(sys.argv[1]).ingest('a')"
    environment = {"TZ": "America/New_York", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", script, str(filled.path)], check=True, env=environment)
    (created,) = filled.query("SELECT created_at FROM runs WHERE run = 'a'").column(0).to_pylist()
    assert created == datetime(2026, 3, 1, 3, 0, 0, 250000)


def test_tokens_and_prompts_are_tables(filled: Trace) -> None:
    assert filled.query("SELECT * EXCLUDE run FROM tokens WHERE run = 'a' ORDER BY ALL").to_pylist() == [
        {"prompt": 0, "position": 0, "token_id": 5, "forced": False},
        {"prompt": 0, "position": 1, "token_id": 6, "forced": False},
        {"prompt": 0, "position": 2, "token_id": 7, "forced": True},
        {"prompt": 1, "position": 0, "token_id": 9, "forced": False},
    ]
    texts = filled.query("SELECT id, text, n_tokens FROM prompts WHERE run = 'a' ORDER BY prompt").to_pylist()
    assert texts[0] == {"id": "first", "text": "Zoë said \"'hi'\"", "n_tokens": 2}
    assert texts[1]["text"] is None


def test_unknown_runs_tensors_and_traces_are_named(filled: Trace, tmp_path: Path) -> None:
    with pytest.raises(TraceNotFoundError, match="has no run 'c'; its runs: a, b"):
        filled.manifest("c")
    with pytest.raises(TraceNotFoundError, match="has no tensor 12"):
        filled.tensor(12)
    with pytest.raises(TraceNotFoundError, match="holds no trace"):
        Trace.open(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no trace"):
        Trace.create(tmp_path)
    with pytest.raises(InputError, match="no trace can be made at"):
        Trace.create(tmp_path / "mine.txt")


def test_exported_parquet_reads_back_equal(filled: Trace, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    counts = export(filled, tmp_path / "parquet")
    assert counts == {table: rows.num_rows for table, rows in contents(filled).items()}
    for table in counts:
        rows = filled.query(f"SELECT * FROM {table}")
        assert pq.read_table(tmp_path / "parquet" / f"{table}.parquet").equals(rows), table
    assert export(filled, tmp_path / "some", tables=["runs"]) == {"runs": 2}
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["runs.parquet"]
    with pytest.raises(InputError, match="no table sqlite_master; tables: runs, prompts"):
        export(filled, tmp_path / "none", tables=["sqlite_master"])


@pytest.fixture
def other(tmp_path: Path) -> Trace:
    """Another trace, with runs `a` and `c`."""
    other = Trace.create(tmp_path / "other")
    capture(other, "a", 5.0)
    capture(other, "c", 6.0)
    return other


def test_merged_runs_are_equal_to_their_originals(filled: Trace, other: Trace, read: Any) -> None:
    assert merge(filled, other, prefix="x-") == {"x-a": 7, "x-c": 7}
    assert filled.run_names() == ["a", "b", "x-a", "x-c"]
    assert verify(filled).problems == ()
    ignored = {"run", "tensor_id", "path"}
    for run in ("a", "c"):
        originals, copies = read(other, f"run = '{run}'"), read(filled, f"run = 'x-{run}'")
        for original, copy in zip(originals, copies, strict=True):
            assert {k: v for k, v in original.row.items() if k not in ignored and v == v} == {
                k: v for k, v in copy.row.items() if k not in ignored and v == v
            }
            assert original.values.tobytes() == copy.values.tobytes()
        assert filled.manifest(f"x-{run}") == replace(
            other.manifest(run), run=f"x-{run}", ordinal=filled.manifest(f"x-{run}").ordinal
        )


def test_a_taken_name_copies_nothing(filled: Trace, other: Trace) -> None:
    with pytest.raises(RunExistsError, match="already has a run 'a'; merge with --prefix"):
        merge(filled, other)
    assert filled.run_names() == ["a", "b"]
    assert merge(filled, other, runs=["c"]) == {"c": 7}


def test_a_damaged_shard_is_not_merged(filled: Trace, other: Trace, read: Any) -> None:
    tensor = read(other, "run = 'c'")[0]
    with (other.path / tensor.row["path"]).open("r+b") as file:
        file.seek(tensor.row["file_offset"])
        file.write(b"\xff")
    with pytest.raises(IntegrityError, match="does not match its checksum"):
        merge(filled, other, prefix="y-")
    assert filled.run_names() == ["a", "b", "y-a"]
    assert verify(filled).problems == ()


def test_an_unfinished_run_is_not_merged(filled: Trace, other: Trace) -> None:
    write_manifest(other.run_folder("c"), replace(other.manifest("c"), status="running"))
    with pytest.raises(InputError, match=r"run 'c' of .* is unfinished; run 'sleuth repair"):
        merge(filled, other, runs=["c"])
    with pytest.raises(InputError, match="run name"):
        merge(filled, other, runs=["a"], prefix="../")
    assert filled.run_names() == ["a", "b"]


def test_a_merged_run_that_loses_its_manifest_keeps_its_new_name(filled: Trace, other: Trace) -> None:
    merge(filled, other, prefix="z-", runs=["a"])
    (filled.run_folder("z-a") / "run.json").unlink()
    repair(filled)
    assert filled.run_names() == ["a", "b", "z-a"]
    assert verify(filled).problems == ()
    assert filled.query("SELECT run FROM runs ORDER BY ordinal").column(0).to_pylist() == ["a", "b", "z-a"]
