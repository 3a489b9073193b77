"""Writing a run: shards roll, equal contents are stored once, memory stays bounded, errors come out as one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tensorsleuth.capture.recorder import record
from tensorsleuth.store import (
    FormatError,
    RunExistsError,
    RunManifest,
    RunWriter,
    StorageError,
    TensorKey,
    Trace,
    repair,
    verify,
)
from tensorsleuth.store.journal import Journal, JournalHeader, read_journal

Array = npt.NDArray[Any]


class Values:
    """A source with values of its own; counts how often it is being read."""

    def __init__(self, array: Array) -> None:
        self.memo: Any = None
        self.array = array

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    @contextmanager
    def values(self) -> Iterator[Array]:
        yield self.array


def key(number: int) -> TensorKey:
    return TensorKey(0, "forward", 0, 0, number, "leaf", "output", "", "")


def begin(trace: Trace, run: str = "run") -> RunManifest:
    return trace.begin_run(
        RunManifest(0, run, "reference", "torch", "m", "float32", "cpu", 1, "running", "2026-01-01T00:00:00+00:00")
    )


def writer(trace: Trace, **options: Any) -> RunWriter:
    manifest = begin(trace)
    return RunWriter(trace.run_folder("run"), "run", manifest=lambda: manifest.to_json(), **options)


def test_a_shard_rolls_once_it_reaches_its_size(trace: Trace, read: Any) -> None:
    with writer(trace, shard_bytes=1000) as run:
        for number in range(25):
            run.put(key(number), Values(np.full(50, number, np.float32)))
    trace.ingest("run")
    shards = trace.query("SELECT shard, n_tensors, state FROM shards ORDER BY shard").to_pylist()
    assert shards == [{"shard": f"rank0-{n}.h5", "n_tensors": 5, "state": "sealed"} for n in range(5)]
    assert [path.name for path in trace.shards("run")] == [row["shard"] for row in shards]
    tensors = read(trace)
    assert [tensor.row["seq"] for tensor in tensors] == list(range(25))
    assert [float(tensor.values[0]) for tensor in tensors] == list(range(25))
    assert not list(trace.run_folder("run").glob("*.journal")) + list(trace.run_folder("run").glob("*.partial"))


def test_values_of_64_bytes_or_more_lie_aligned_in_the_file(trace: Trace, read: Any) -> None:
    with writer(trace) as run:
        for number in range(20):
            run.put(key(number), Values(np.arange(7 * number, dtype=np.uint8)))
    trace.ingest("run")
    assert {tensor.row["file_offset"] % 64 for tensor in read(trace, "t.nbytes >= 64")} == {0}


def test_equal_bytes_of_one_dtype_are_stored_once_per_shard(trace: Trace, read: Any) -> None:
    zeros = np.zeros(8, np.float32)
    with writer(trace) as run:
        for number, array in enumerate((zeros, zeros.copy(), zeros.reshape(2, 4), zeros.view(np.int32), zeros[:0])):
            run.put(key(number), Values(array))
    trace.ingest("run")
    found = read(trace)
    assert [tensor.row["alias"] for tensor in found] == [False, True, True, False, False]
    assert [tensor.values.shape for tensor in found] == [(8,), (8,), (2, 4), (8,), (0,)]
    assert [str(tensor.values.dtype) for tensor in found] == ["float32"] * 3 + ["int32", "float32"]
    assert len({tensor.row["file_offset"] for tensor in found[:3]}) == 1
    assert run.totals.nbytes == 4 * 32
    assert run.totals.stored_nbytes == 2 * 32
    assert verify(trace).problems == ()


def test_a_full_queue_holds_the_producer_up_and_loses_nothing(trace: Trace, read: Any, gate: threading.Event) -> None:
    run = writer(trace, queue_bytes=1000)
    most = 0

    def produce() -> None:
        nonlocal most
        for number in range(50):
            run.put(key(number), Values(np.full(100, number, np.float32)))
            most = max(most, run._waiting_bytes)

    producer = threading.Thread(target=produce)
    producer.start()
    producer.join(0.3)
    assert producer.is_alive()
    assert len(run._queue) <= 3
    gate.set()
    producer.join(20)
    run.flush()
    assert run.totals.n_tensors == 50
    run.close()
    assert most <= 1000 + 400
    trace.ingest("run")
    assert [float(tensor.values[0]) for tensor in read(trace)] == list(range(50))


def test_a_tensor_larger_than_the_queue_passes(trace: Trace) -> None:
    with writer(trace, queue_bytes=10) as run:
        for number in range(3):
            run.put(key(number), Values(np.full(1000, number, np.float32)))
    assert run.totals.n_tensors == 3


def test_memory_stays_bounded_while_the_disk_is_slow(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most, lock = 0, 0, threading.Lock()

    class Counted(Values):
        def __init__(self, array: Array) -> None:
            nonlocal alive, most
            super().__init__(array)
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    with writer(trace, queue_bytes=5 * 400) as run:
        for number in range(300):
            run.put(key(number), Counted(np.full(100, number, np.float32)))
    # 5 waiting within the limit, one beyond it, one being put; one being summarised, two waiting, one being stored; one
    # of each thread just done
    assert most <= 13


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("HDF5"), KeyError("bug")])
def test_an_error_of_the_writer_reaches_the_producer_and_never_blocks_it(
    trace: Trace, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    run = writer(trace, queue_bytes=100)
    run.put(key(0), Values(np.ones(4, np.float32)))
    run.flush()
    monkeypatch.setattr(run, "_store", fail)
    expected = KeyError if isinstance(error, KeyError) else StorageError
    with pytest.raises(expected):  # noqa: PT012
        for number in range(100):
            run.put(key(number), Values(np.ones(100, np.float32)))
    with pytest.raises(expected):
        run.flush()
    with pytest.raises(expected):
        run.close()
    (salvage,) = repair(trace)
    assert (salvage.n_salvaged, salvage.n_damaged) == (1, 0)
    assert verify(trace).problems == ()


class Emit(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leaf = torch.nn.Identity()

    def forward(self, number: int) -> None:
        self.leaf(torch.full((20_000,), float(number)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_storage_error_and_repair_restores_what_was_acknowledged(
    small_disk: Path, read: Any
) -> None:
    trace = Trace.create(small_disk / "trace")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    model = Emit()
    flushed = 0
    with (  # noqa: PT012
        pytest.raises(StorageError, match=r"No space left.*free space, then 'sleuth repair"),
        record(trace, model, run="run", role="reference", shard_bytes=500_000, queue_bytes=100_000) as recorder,
    ):
        for number in range(100):
            model(number)
            recorder.flush()
            flushed = number + 1
    assert 5 < flushed < 60
    assert not model._forward_hooks
    ballast.unlink()
    assert sum(salvage.n_damaged for salvage in repair(trace)) == 0
    assert verify(trace).problems == ()
    assert trace.manifest("run").status == "repaired"
    found = read(trace)
    assert len(found) >= flushed
    for number, tensor in enumerate(found):
        np.testing.assert_array_equal(tensor.values, np.full(20_000, number, np.float32))


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4, 8, 20, 80, 200])
def test_a_disk_that_gets_full_at_the_end_of_the_run_loses_nothing(small_disk: Path, read: Any, left: int) -> None:
    """`left` pages remain when the run ends: sealing, the manifest or the catalog fails, or none of them."""
    trace = Trace.create(small_disk / "trace")
    model = Emit()
    ballast = small_disk / "ballast"
    refusal = ""
    try:
        with record(trace, model, run="run", role="reference") as recorder:
            model(1)
            recorder.flush()
            fill(ballast)
            os.truncate(ballast, ballast.stat().st_size - left * 4096)
    except StorageError as error:
        refusal = str(error)
    assert left > 4 if not refusal else re.search(r"No space left.*free space, then 'sleuth", refusal)
    ballast.unlink()
    repair(trace)
    assert verify(trace).problems == ()
    (tensor,) = read(trace)
    np.testing.assert_array_equal(tensor.values, np.ones(20_000, np.float32))


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_run_that_another_process_writes_is_refused(trace: Trace) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_run, args=(str(trace.path), ready, done))
    other.start()
    try:
        assert ready.wait(20)
        with pytest.raises(RunExistsError, match="being written by another process"):
            begin(trace)
        with pytest.raises(RunExistsError, match=f"being written by process {other.pid}"):
            RunWriter(trace.run_folder("run"), "run", manifest=lambda: b"")
        (salvage,) = repair(trace)
        assert "live process" in salvage.note
    finally:
        done.set()
        other.join()
    assert other.exitcode == 0
    trace.ingest("run")
    assert verify(trace).problems == ()


def hold_run(folder: str, ready: Any, done: Any) -> None:
    """Write a run until told to stop."""
    with writer(Trace.open(folder)) as run:
        run.put(key(0), Values(np.ones(3, np.float32)))
        run.flush()
        ready.set()
        done.wait(20)


def test_ranks_write_side_by_side(trace: Trace, read: Any) -> None:
    manifest = begin(trace)
    writers = [
        RunWriter(trace.run_folder("run"), "run", rank=rank, manifest=lambda: manifest.to_json()) for rank in range(3)
    ]
    for rank, run in enumerate(writers):
        run.put(key(0), Values(np.full(3, rank, np.float32)))
    for run in writers:
        run.close()
    trace.ingest("run")
    assert [(tensor.row["rank"], float(tensor.values[0])) for tensor in read(trace)] == [(0, 0), (1, 1), (2, 2)]
    ids = [tensor.row["tensor_id"] for tensor in read(trace)]
    assert ids == [1 * 10**12 + rank * 10**8 for rank in range(3)]


def test_a_journal_ends_at_its_first_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "rank0-0.journal"
    rows = [(n, *[None] * 26) for n in range(3)]
    with Journal(path, JournalHeader("run", 0, 0)) as journal:
        for row in rows:
            journal.append(row)
    assert read_journal(path) == (JournalHeader("run", 0, 0), rows)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        header, found = read_journal(path)
        assert (header is not None) == (complete > 0)
        assert found == rows[: max(complete - 1, 0)]
    damaged = bytearray(lines[2])
    damaged[30] ^= 1
    path.write_bytes(lines[0] + lines[1] + bytes(damaged) + lines[3])
    assert read_journal(path)[1] == rows[:1]


def test_a_journal_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank0-0.journal"
    monkeypatch.setattr("tensorsleuth.store.journal.FORMAT_VERSION", 99)
    Journal(path, JournalHeader("run", 0, 0)).close()
    monkeypatch.undo()
    with pytest.raises(FormatError, match="format version 99"):
        read_journal(path)


def test_no_files_stay_open_after_a_run(trace: Trace) -> None:
    model = Emit()
    with record(trace, model, run="first", role="reference"):
        model(0)
    gc.collect()  # earlier tests leave files to the collector
    before = os.listdir("/proc/self/fd")
    for run in ("second", "third"):
        with record(trace, model, run=run, role="reference", shard_bytes=1000):
            model(0)
            model(1)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
