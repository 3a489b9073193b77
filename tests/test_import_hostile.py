"""Dumps that are broken or hostile: nothing runs, nothing is written outside the trace, everything is reported."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_dumps import HookDump, write_forward, write_tokens
from safetensors.torch import save_file
from tensorsleuth.capture.importers import ImportOptions, ImportSummary, import_dump
from tensorsleuth.capture.importers.dump import DumpFile, Report, tensors_of
from tensorsleuth.capture.pending import to_numpy
from tensorsleuth.cli.app import main
from tensorsleuth.store import InputError, StorageError, Trace
from tensorsleuth.store.shard_writer import ShardWriter

Out = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dump with one good file."""
    path = tmp_path / "dump"
    path.mkdir()
    torch.save(torch.ones(2, 3), path / "good.pt")
    return path


def run_import(trace: Trace, source: Path) -> ImportSummary:
    return import_dump(trace, source, run="t", role="target")


class Attack:
    """Unpickles into a call that leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def malicious_zip(path: Path, proof: Path) -> None:
    torch.save({"x": torch.ones(2), "y": Attack(proof)}, path)


def malicious_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps(Attack(proof), protocol=2))


def malicious_new_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps(Attack(proof), protocol=5))


def malicious_numpy(path: Path, proof: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Attack(proof)], dtype=object), allow_pickle=True)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("bad.pt", malicious_zip, "refused: its pickle asks for posix.system"),
        ("bad.pth", malicious_pickle, "refused: its pickle asks for posix.system"),
        ("new.pt", malicious_new_pickle, "is not a file that torch.save wrote"),
        ("bad.npy", malicious_numpy, "refused: it holds pickled Python objects"),
    ],
)
def test_code_is_refused_and_never_runs(
    trace: Trace, folder: Path, tmp_path: Path, name: str, write: Callable[[Path, Path], None], reason: str
) -> None:
    proof = tmp_path / "proof"
    write(folder / name, proof)
    summary = run_import(trace, folder)
    assert reason in summary.skipped[name]
    assert not proof.exists()
    assert summary.n_tensors == 1
    assert trace.manifest("t").provenance["skipped"] == summary.skipped


def test_a_malicious_file_among_the_hooks_files_does_not_stop_the_others(trace: Trace, tmp_path: Path) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([[3, 4, 5]], [[6]])
    name = "captured_tensors_cte_step_1_module_norm_output.pt"
    malicious_zip(dump.folder / name, tmp_path / "proof")
    summary = run_import(trace, dump.folder)
    assert list(summary.skipped) == [name]
    assert summary.n_tensors == 9
    assert not (tmp_path / "proof").exists()


def truncated(path: Path) -> None:
    torch.save(torch.ones(1000), path)
    path.write_bytes(path.read_bytes()[:-500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\x01garbage" * 50)


def no_tensor(path: Path) -> None:
    torch.save({"a": 1, "b": "text"}, path)


def no_elements(path: Path) -> None:
    torch.save(torch.ones(0, 4), path)


def meta_tensor(path: Path) -> None:
    torch.save(torch.ones(3, device="meta"), path)


def sparse(path: Path) -> None:
    torch.save(torch.eye(3).to_sparse(), path)


def quantised(path: Path) -> None:
    torch.save(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), path)


def inflated(path: Path) -> None:
    torch.save(torch.ones(1).expand(1 << 16, 1 << 16), path)


def compressed(path: Path) -> None:
    torch.save(torch.zeros(1000), path)
    with zipfile.ZipFile(path) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)


def deep(path: Path) -> None:
    value: Any = [torch.ones(1)]
    for _ in range(400):
        value = [value]
    torch.save(value, path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def outside(path: Path) -> None:
    target = path.parent.parent / "secret.pt"
    torch.save(torch.ones(3), target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (truncated, "cannot be read: "),
        (empty, "is empty (0 bytes)"),
        (garbage, "is not a file that torch.save wrote"),
        (no_tensor, "holds no tensor"),
        (no_elements, "holds no elements (shape [0, 4])"),
        (meta_tensor, "a meta tensor"),
        (sparse, "layout torch.sparse_coo cannot be stored"),
        pytest.param(
            quantised,
            "dtype qint8 cannot be stored bit for bit",
            marks=pytest.mark.filterwarnings("ignore:torch.quant"),
        ),
        (inflated, "claims 17179869184 bytes of values, the file holds 4"),
        (compressed, "holds compressed records"),
        (deep, "characters, at most 255 are taken over"),
        (fifo, "is no regular file"),
        (outside, "is a link that leaves the dump"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    trace: Trace, folder: Path, write: Callable[[Path], None], reason: str
) -> None:
    write(folder / "bad.pt")
    summary = run_import(trace, folder)
    assert [reason in text for text in summary.skipped.values()] == [True]
    assert next(iter(summary.skipped)).startswith("bad.pt")
    assert summary.n_tensors == 1


def test_broken_numpy_and_safetensors_files_are_named(trace: Trace, folder: Path) -> None:
    np.save(folder / "short.npy", np.ones(100))
    (folder / "short.npy").write_bytes((folder / "short.npy").read_bytes()[:-8])
    np.save(folder / "void.npy", torch.ones(2).numpy().view("V4"))
    np.save(folder / "text.npy", np.array(["a", "b"]))
    save_file({"a": torch.ones(100)}, folder / "short.safetensors")
    (folder / "short.safetensors").write_bytes((folder / "short.safetensors").read_bytes()[:-8])
    (folder / "huge.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    (folder / "old.pkl").write_bytes(b"")
    skipped = run_import(trace, folder).skipped
    assert set(skipped) == {"short.npy", "void.npy", "text.npy", "short.safetensors", "huge.safetensors", "old.pkl"}
    assert "names no number format" in skipped["void.npy"]
    assert "cannot be stored" in skipped["text.npy"]
    assert skipped["old.pkl"].startswith("is a pickle, which is never opened")


@pytest.mark.parametrize("key", ["../../escape", "/etc/passwd", "a\0b", "n" * 300, "a\nb", "\ud800", ".."])
def test_names_that_are_no_module_paths_are_refused(trace: Trace, folder: Path, tmp_path: Path, key: str) -> None:
    before = {path for path in tmp_path.rglob("*") if "trace" not in path.parts}
    torch.save({key: torch.ones(2), "ok": torch.ones(3)}, folder / "named.pt")
    summary = run_import(trace, folder)
    (place,) = summary.skipped
    assert place.startswith("named.pt[")
    assert place.isprintable()
    assert summary.n_tensors == 2
    after = {path for path in tmp_path.rglob("*") if "trace" not in path.parts}
    assert after - before == {folder / "named.pt"}
    assert {path.name for path in trace.run_folder("t").iterdir()} == {"run.json", "rank0-0.h5"}


def test_file_names_that_are_no_text_are_refused(trace: Trace, folder: Path) -> None:
    torch.save(torch.ones(2), folder / "x.pt")
    os.rename(folder / "x.pt", os.fsencode(folder) + b"/x\xff.pt")
    (folder / f"{'n' * 250}.npy").write_bytes(b"")
    skipped = run_import(trace, folder).skipped
    assert skipped["x\\udcff.pt"] == "its name holds control characters or is not text"
    assert any("(254 characters)" in name for name in skipped)


def test_a_module_folder_with_a_name_of_control_characters_is_refused(trace: Trace, tmp_path: Path) -> None:
    tensors = {"norm": {0: torch.ones(2, 4)}, "a\nb": {0: torch.ones(2, 4)}}
    write_forward(tmp_path / "d", "prefill_s2_0", tensors, requests=["0"], positions=[0, 1])
    summary = run_import(trace, tmp_path / "d")
    assert list(summary.skipped) == ["dp0/prefill_s2_0/a\\nb/rank0.pt"]


def test_nothing_imported_leaves_no_run(trace: Trace, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "a.pt").write_bytes(b"x")
    assert main(["import", str(trace.path), str(tmp_path / "dump"), "--run", "t", "--role", "target"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sleuth: nothing could be imported from")
    assert "a.pt: is not a file that torch.save wrote" in error
    assert error.count("\n") == 1
    assert trace.run_names() == []


def test_a_full_disk_leaves_no_run(trace: Trace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", refuse)
    with pytest.raises(StorageError, match="No space left"):
        run_import(trace, folder)
    assert trace.run_names() == []


class TestFormats:
    """Recognising the layout."""

    def test_nothing_recognised_names_what_was_expected(self, trace: Trace, tmp_path: Path) -> None:
        (tmp_path / "dump").mkdir()
        (tmp_path / "dump" / "notes.txt").write_text("no tensors")
        with pytest.raises(InputError, match=r"expected one of: nxdi: captured_tensors_.*vllm-neuron: dp0/"):
            run_import(trace, tmp_path / "dump")

    def test_two_layouts_are_ambiguous(self, trace: Trace, tmp_path: Path) -> None:
        HookDump(tmp_path / "dump").generate([[1, 2]], [[]])
        write_forward(
            tmp_path / "dump", "prefill_s2_0", {"norm": {0: torch.ones(2, 4)}}, requests=["0"], positions=[0, 1]
        )
        with pytest.raises(InputError, match=r"is ambiguous: .* choose --format nxdi or --format vllm-neuron"):
            run_import(trace, tmp_path / "dump")
        summary = import_dump(trace, tmp_path / "dump", run="t", role="target", format="vllm-neuron")
        assert summary.n_tensors == 1
        assert len(summary.skipped) == 5

    def test_hook_and_skill_names_together_are_ambiguous(self, trace: Trace, tmp_path: Path) -> None:
        dump = HookDump(tmp_path / "dump")
        dump.generate([[1, 2]], [[3]])
        dump.write("captured_tensors_tg_step_3_module_norm_output.pt", torch.ones(1, 1, 16))
        with pytest.raises(InputError, match=r"is ambiguous: .* choose --format nxdi or --format equivalence"):
            run_import(trace, dump.folder)
        assert import_dump(trace, dump.folder, run="t", role="target", format="nxdi").n_tensors == 11

    def test_dumps_below_the_folder_are_named(self, trace: Trace, tmp_path: Path) -> None:
        HookDump(tmp_path / "all" / "prompt0").generate([[1, 2]], [[]])
        with pytest.raises(InputError, match=r"import them one by one, for example .*prompt0"):
            run_import(trace, tmp_path / "all")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--format", "hdf5"], "format 'hdf5' is unknown; choose one of auto, nxdi"),
            (["--role", "other"], "role 'other' is unknown"),
            (["--rank", "1"], "rank 1 of 1 is not possible"),
            (["--run", "../x"], "run name '../x' is not usable"),
        ],
    )
    def test_bad_arguments_are_one_line(
        self, trace: Trace, folder: Path, capsys: Out, arguments: list[str], message: str
    ) -> None:
        given = ["import", str(trace.path), str(folder), "--run", "t", "--role", "target", *arguments]
        assert main(given) == 2
        assert message in capsys.readouterr().err

    def test_a_source_that_does_not_exist(self, trace: Trace, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist; name the folder"):
            run_import(trace, tmp_path / "nowhere")


def test_the_command_prints_what_it_did(trace: Trace, tmp_path: Path, capsys: Out) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([[3, 4, 5]], [[6]])
    dump.save("layers.0.mlp", torch.zeros(1).bfloat16(), suffix="_1")
    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": [3, 4, 5, 6]}])
    arguments = ["import", str(trace.path), str(dump.folder), "--role", "target", "--tokens", str(tokens)]
    assert main([*arguments, "--run", "a"]) == 0
    captured = capsys.readouterr()
    assert "10, 10 of them with positions" in captured.out
    assert "assumed: prompts are taken in the order of the tokens; the embedding rows agree" in captured.out
    assert "skipped: captured_tensors_tkg_step_2_module_layers.0.mlp_output_1.pt: placeholder" in captured.err
    assert main([*arguments, "--run", "b", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run"], printed["format"], printed["n_tensors"]) == ("b", "nxdi", 10)
    assert printed["skipped"]["captured_tensors_cte_step_1_module_layers.0.mlp_output_1.pt"].startswith("missing")


def anonymous_bytes() -> int:
    """Resident memory of this process that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


def test_files_are_mapped_not_loaded(trace: Trace, tmp_path: Path) -> None:
    """Importing 20 files of 8 MB takes no more memory than a few of them."""
    folder = tmp_path / "dump"
    folder.mkdir()
    for index in range(20):
        torch.save(torch.full((2 << 20,), float(index)), folder / f"layers.{index}.mlp.pt")
    before = anonymous_bytes()
    seen: list[int] = []

    def progress(stage: str, done: int = 0, total: int = 0) -> None:
        seen.append(anonymous_bytes() - before)

    import_dump(trace, folder, run="t", role="target", progress=progress)
    assert max(seen) < 40 << 20


def test_an_import_option_is_kept_with_the_run(trace: Trace, folder: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": [3, 4]}])
    import_dump(trace, folder, run="t", role="target", options=ImportOptions(tokens=tokens))
    kept = trace.manifest("t").provenance["import"]
    assert (kept["source"], kept["format"], kept["tokens"]) == (str(folder), "tensors", str(tokens))


def test_links_to_folders_are_not_followed(trace: Trace, folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    assert run_import(trace, folder).skipped == {"loop": "is a link to a folder, not followed"}


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_damaged_bytes_are_a_reason_or_other_values_but_never_a_crash(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    values = torch.arange(64.0)
    {
        ".pt": lambda: torch.save({"a": values, "b": [values]}, path),
        ".npy": lambda: np.save(path, values.numpy()),
        ".safetensors": lambda: save_file({"a": values}, path),
    }[suffix]()
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole[: random.integers(1, len(whole) + 1)] if random.random() < 0.3 else whole)
        for place in random.integers(0, len(data), random.integers(1, 6)):
            data[place] = random.integers(256)
        path.write_bytes(data)
        report = Report()
        n = sum(to_numpy(tensor).size for _, tensor in tensors_of(DumpFile(path, path.name), report))
        assert n <= 128
        assert n or report.skipped
