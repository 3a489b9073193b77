"""verify finds every kind of damage and names the file; repair brings back what can be brought back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from tensorsleuth.capture.recorder import record
from tensorsleuth.cli.app import main
from tensorsleuth.store import IntegrityError, Trace, index, repair, verify
from tensorsleuth.store.hdf5_file import INDEX_DATASET
from tensorsleuth.store.journal import Journal, JournalHeader, read_journal
from tensorsleuth.store.manifest import read_manifest, write_manifest


def capture(trace: Trace, run: str = "run") -> None:
    """A run of three shards with four tensors each."""
    model = torch.nn.Module()
    model.leaf = torch.nn.Identity()
    with torch.no_grad(), record(trace, model, run=run, role="reference", shard_bytes=4 * 400):
        for number in range(12):
            model.leaf(torch.full((100,), float(number)))


@pytest.fixture
def sound(trace: Trace) -> Trace:
    capture(trace)
    assert len(trace.shards("run")) == 3
    assert verify(trace).problems == ()
    return trace


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def problem(trace: Trace) -> str:
    (only,) = verify(Trace.open(trace.path)).problems
    return only


@pytest.mark.parametrize(("seq", "byte", "bit"), [(0, 0, 0), (5, 399, 7), (11, 200, 3)])
def test_a_flipped_bit_in_a_tensor(sound: Trace, read: Any, seq: int, byte: int, bit: int) -> None:
    tensor = read(sound)[seq]
    flip(sound.path / tensor.row["path"], tensor.row["file_offset"] + byte, bit)
    assert f"{tensor.row['path']}: tensor {seq} ({tensor.row['dataset']}) does not match" in problem(sound)


def test_every_flipped_bit_of_the_index(sound: Trace) -> None:
    shard = sound.shards("run")[1]
    with h5py.File(shard) as file:
        dataset = file[INDEX_DATASET]
        start, size = dataset.id.get_offset(), dataset.shape[0]
    for byte in range(0, size, size // 20):
        flip(shard, start + byte)
        assert problem(sound) == f"the index of shard {shard} does not match its checksum; restore the file"
        flip(shard, start + byte)
    assert verify(sound).problems == ()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, -1])
def test_a_truncated_shard(sound: Trace, keep: float) -> None:
    shard = sound.shards("run")[2]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1 if keep < 0 else int(size * keep))
    assert str(shard) in problem(sound)
    assert "truncated or damaged" in problem(sound)


def test_a_missing_shard(sound: Trace) -> None:
    sound.shards("run")[1].unlink()
    assert problem(sound) == "shard run/rank0-1.h5 is in the catalog but not on disk"


def test_a_foreign_hdf5_file(sound: Trace) -> None:
    with h5py.File(sound.run_folder("run") / "rank0-7.h5", "w") as file:
        file["x"] = np.arange(3)
    assert "is an HDF5 file but no shard of tensorsleuth; move it out of the trace" in problem(sound)


def test_a_file_that_is_no_hdf5(sound: Trace) -> None:
    (sound.run_folder("run") / "rank0-7.h5").write_text("not at all")
    assert "rank0-7.h5 cannot be opened as HDF5" in problem(sound)


def test_a_shard_of_another_format_version(sound: Trace) -> None:
    shard = sound.shards("run")[0]
    with h5py.File(shard, "r+") as file:
        file.attrs["tensorsleuth_format"] = 2
    assert f"{shard} has format version 2, this tensorsleuth reads 1" in problem(sound)


def test_a_shard_of_another_run_under_this_name(sound: Trace) -> None:
    first, second, _ = sound.shards("run")
    shutil.copy(first, second)
    assert problem(sound) == f"shard {second} is not the one in the catalog; run 'sleuth index {sound.path} --rebuild'"


def test_a_shard_that_the_catalog_does_not_know(sound: Trace) -> None:
    shutil.copy(sound.shards("run")[0], sound.run_folder("run") / "rank0-3.h5")
    assert "rank0-3.h5 is not in the catalog; run 'sleuth index" in problem(sound)


def test_a_missing_catalog_is_named_and_rebuilt(sound: Trace) -> None:
    sound.catalog_path.unlink()
    problems = verify(sound).problems
    assert problems[0] == f"{sound.catalog_path} does not exist; build it with 'sleuth index {sound.path}'"
    index(sound)
    assert verify(sound).problems == ()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_a_lost_or_damaged_manifest_is_restored_from_a_shard(sound: Trace, damage: Callable[[Path], Any]) -> None:
    path = sound.run_folder("run") / "run.json"
    before = read_manifest(path.parent)
    damage(path)
    assert "run 'sleuth repair' on the trace" in problem(sound) or "'sleuth repair' restores it" in problem(sound)
    repair(sound)
    assert verify(sound).problems == ()
    after = read_manifest(path.parent)
    facts = {**before.provenance, "captured": None}
    assert replace(after, provenance={**after.provenance, "captured": None}) == replace(before, provenance=facts)


def test_damaged_runs_do_not_hide_sound_ones(sound: Trace) -> None:
    capture(sound, "second")
    (sound.run_folder("run") / "run.json").write_text('{"format": "tensorsleuth-run", "version": 9}')
    assert set(sound.run_names()) == {"run", "second"}
    assert "version 9, this tensorsleuth reads tensorsleuth-run version 1" in problem(sound)
    capture(sound, "third")
    assert sound.manifest("third").ordinal == 3


def test_an_empty_trace_has_no_problems(trace: Trace) -> None:
    assert verify(trace).problems == ()
    assert repair(trace) == []


def test_a_run_that_died_before_its_first_line_is_removed(sound: Trace) -> None:
    folder = sound.run_folder("died")
    folder.mkdir()
    (folder / "run.json.tmp").write_text('{"format"')
    (salvage,) = repair(sound)
    assert salvage.note == "nothing had been recorded: folder removed"
    assert not folder.exists()
    assert verify(sound).problems == ()


def reopened(trace: Trace) -> Path:
    """Turn the last shard back into an unfinished one, as a killed writer leaves it; returns its journal."""
    shard = trace.shards("run")[-1]
    rows = trace.query("SELECT * EXCLUDE (tensor_id, run, rank, shard) FROM tensors WHERE shard = ?", [shard.name])
    journal = shard.with_suffix(".journal")
    with Journal(journal, JournalHeader("run", 0, 2)) as lines:
        for row in rows.to_pylist():
            lines.append(tuple(row.values()))
    shard.rename(shard.with_suffix(".h5.partial"))
    write_manifest(trace.run_folder("run"), replace(trace.manifest("run"), status="running"))
    return journal


def test_an_unfinished_shard_is_salvaged_from_its_journal(sound: Trace, read: Any) -> None:
    before = [tensor.values.copy() for tensor in read(sound)]
    journal = reopened(sound)
    assert len(read_journal(journal)[1]) == 4
    problems = verify(Trace.open(sound.path)).problems
    assert problems == (
        "run 'run' has an unfinished shard rank0-2; run 'sleuth repair'",
        "shard run/rank0-2.h5 is in the catalog but not on disk",
    )
    trace = Trace.open(sound.path)
    (salvage,) = repair(trace)
    assert (salvage.n_salvaged, salvage.n_damaged, salvage.shard) == (4, 0, "rank0-2.h5")
    assert verify(trace).problems == ()
    assert trace.manifest("run").status == "repaired"
    for tensor, values in zip(read(trace), before, strict=True):
        np.testing.assert_array_equal(tensor.values, values)
    assert sorted(path.name for path in trace.run_folder("run").iterdir()) == [
        "rank0-0.h5",
        "rank0-1.h5",
        "rank0-2.h5",
        "run.json",
    ]
    assert repair(trace) == []


def test_a_damaged_tensor_of_an_unfinished_shard_is_dropped_and_the_file_kept(sound: Trace, read: Any) -> None:
    offset = read(sound)[9].row["file_offset"]
    journal = reopened(sound)
    partial = journal.with_suffix(".h5.partial")
    flip(partial, offset)
    trace = Trace.open(sound.path)
    (salvage,) = repair(trace)
    assert (salvage.n_salvaged, salvage.n_damaged) == (3, 1)
    assert [tensor.row["seq"] for tensor in read(trace)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert partial.with_suffix(".damaged").exists()
    assert verify(trace).problems == ()


def test_a_repair_that_is_interrupted_can_be_repeated(sound: Trace, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = reopened(sound)
    for step in ("create_tensor", "seal", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tensorsleuth.store.integrity.{step}", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                repair(Trace.open(sound.path))
    trace = Trace.open(sound.path)
    repair(trace)
    assert verify(trace).problems == ()
    assert not journal.exists()
    assert len(read(trace)) == 12


def test_reading_beyond_a_truncated_shard_is_an_error_not_a_crash(sound: Trace) -> None:
    with sound.shards("run")[0].open("r+b") as file:
        file.truncate(100)
    (tensor_id,) = sound.query("SELECT min(tensor_id) AS id FROM tensors").column(0).to_pylist()
    with pytest.raises(IntegrityError, match="is truncated"):
        sound.tensor(tensor_id)


def test_a_shard_written_by_an_unknown_journal_version_is_left_for_the_version_that_wrote_it(
    sound: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tensorsleuth.store.journal.FORMAT_VERSION", 2)
        reopened(sound)
    (salvage,) = repair(sound)
    assert salvage.failed
    assert "repair it with the version that wrote it" in salvage.note
    assert (sound.run_folder("run") / "rank0-2.h5.partial").exists()


def test_damage_in_one_run_does_not_stop_the_repair_of_the_others(sound: Trace, read: Any) -> None:
    for name in ("second", "third"):
        capture(sound, name)
    for shard in (sound.shards("run")[0], sound.shards("run")[1], sound.shards("second")[2]):
        with shard.open("r+b") as file:
            file.truncate(200)
    (sound.run_folder("third") / "run.json").unlink()
    sound.catalog_path.unlink()
    trace = Trace.open(sound.path)
    salvages = repair(trace)
    assert [(s.run, s.shard, s.failed) for s in salvages] == [
        ("run", "rank0-0.h5", True),
        ("run", "rank0-1.h5", True),
        ("second", "rank0-2.h5", True),
    ]
    assert len(read(trace, "run = 'third'")) == 12
    assert main(["repair", str(sound.path)]) == 2


def test_what_the_catalog_holds_is_not_entered_again(sound: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(sound, "second")
    reopened(sound)
    trace = Trace.open(sound.path)
    entered: list[str] = []
    ingest = Trace.ingest
    monkeypatch.setattr(Trace, "ingest", lambda self, run, **options: entered.append(run) or ingest(self, run))
    repair(trace)
    repair(trace)
    assert entered == ["run"]
    assert verify(trace).problems == ()


def test_random_damage_anywhere_is_reported_or_harmless_and_never_crashes(sound: Trace, read: Any) -> None:
    shard = sound.shards("run")[0]
    original = shard.read_bytes()
    values = [tensor.values.copy() for tensor in read(sound)[:4]]
    choose = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(original)
        for position in choose.integers(0, len(damaged), 3):
            damaged[position] ^= 1 << int(choose.integers(0, 8))
        shard.write_bytes(bytes(damaged))
        if not verify(Trace.open(sound.path)).problems:
            for tensor, wanted in zip(read(Trace.open(sound.path))[:4], values, strict=True):
                np.testing.assert_array_equal(tensor.values, wanted)
