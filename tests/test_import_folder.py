"""Plain folders of .pt, .npy and .safetensors: every dtype bit for bit, names as data, positions where tokens tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_dumps import write_tokens
from safetensors.torch import save_file
from tensorsleuth.capture.importers import ImportOptions, ImportSummary, import_dump
from tensorsleuth.store import Trace

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64),
)


def run_import(trace: Trace, source: Path, **options: Any) -> ImportSummary:
    return import_dump(trace, source, run="t", role="target", options=ImportOptions(**options))


def rows_of(trace: Trace, columns: str) -> list[tuple[Any, ...]]:
    query = f"SELECT {columns} FROM tensors ORDER BY ALL"
    return [tuple(row.values()) for row in trace.query(query).to_pylist()]


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Every byte value, so that odd bit patterns (NaNs with payloads, negative zeros) are among them."""
    raw = torch.arange(256, dtype=torch.uint8).repeat(2)
    return (raw > 127) if dtype is torch.bool else raw.view(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "dump"
    path.mkdir()
    return path


def test_every_dtype_is_read_back_bit_for_bit(trace: Trace, folder: Path, read: Any) -> None:
    tensors = {str(dtype).removeprefix("torch."): sample(dtype) for dtype in DTYPES}
    torch.save(tensors, folder / "pickled.pt")
    torch.save(tensors["bfloat16"], folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, folder / "safe.safetensors")
    for name in ("float32", "float16", "int64", "bool", "complex64"):
        np.save(folder / f"{name}.npy", tensors[name].numpy())
    summary = run_import(trace, folder)
    assert (summary.format, summary.stack, summary.skipped) == ("tensors", "import", {})
    assert summary.n_tensors == 2 * len(DTYPES) + 1 + 5
    for stored in read(trace):
        wanted = tensors[stored.row["dtype"]]
        assert stored.values.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


def test_views_and_other_byte_orders_are_read_as_their_values(trace: Trace, folder: Path, read: Any) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": base.t(), "part": base[1:, ::2], "expanded": base[:1].expand(5, 4)}, folder / "views.pt")
    np.save(folder / "big.npy", np.arange(6, dtype=">f4"))
    np.save(folder / "fortran.npy", np.asfortranarray(base.numpy()))
    run_import(trace, folder)
    found = {stored.row["slot"] or stored.row["module"]: stored.values for stored in read(trace)}
    np.testing.assert_array_equal(found["t"], base.numpy().T)
    np.testing.assert_array_equal(found["part"], base.numpy()[1:, ::2])
    np.testing.assert_array_equal(found["expanded"], np.broadcast_to(base.numpy()[:1], (5, 4)))
    np.testing.assert_array_equal(found["big"], np.arange(6))
    np.testing.assert_array_equal(found["fortran"], base.numpy())


def test_files_and_keys_name_modules_and_slots(trace: Trace, folder: Path) -> None:
    (folder / "layers" / "0").mkdir(parents=True)
    torch.save(torch.ones(2), folder / "layers" / "0" / "mlp.pt")
    torch.save({"0": torch.ones(2), "nested": {"a": [torch.ones(2)]}}, folder / "layers.1.self_attn.pt")
    save_file({"model.layers.2.mlp": torch.ones(2), "bias": torch.ones(2)}, folder / "all.safetensors")
    np.save(folder / "step_3_norm.npy", np.ones(2, np.float32))
    np.save(folder / "norm_step4.npy", np.ones(2, np.float32))
    run_import(trace, folder)
    assert rows_of(trace, "module, slot, step, phase") == [
        ("all", "bias", 0, "forward"),
        ("layers.0.mlp", "", 0, "forward"),
        ("layers.1.self_attn", "0", 0, "forward"),
        ("model.layers.2.mlp", "", 0, "forward"),
        ("nested.a.0", "", 0, "forward"),
        ("norm", "", 3, "forward"),
        ("norm", "", 4, "forward"),
    ]


def test_one_file_is_a_dump_too(trace: Trace, folder: Path) -> None:
    save_file({"layers.0.mlp": torch.ones(2)}, folder / "acts.safetensors")
    run_import(trace, folder / "acts.safetensors")
    assert rows_of(trace, "module") == [("layers.0.mlp",)]


def test_a_second_file_of_one_site_is_a_duplicate(trace: Trace, folder: Path) -> None:
    torch.save(torch.ones(2), folder / "norm.pt")
    np.save(folder / "norm.npy", np.zeros(2, np.float32))
    assert run_import(trace, folder).skipped == {"norm.pt": "duplicate: norm.npy holds the same site, step and prompt"}


def test_tokens_give_positions_to_what_has_a_token_axis(trace: Trace, folder: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": [1, 2, 3, 4, 5], "n_prompt": 3}])
    torch.save(torch.ones(1, 8, 4), folder / "padded.pt")
    torch.save(torch.ones(1, 5, 4), folder / "whole.pt")
    torch.save(torch.ones(3, 4), folder / "flat.pt")
    torch.save(torch.ones(1, 1, 4), folder / "step_2_padded.pt")
    torch.save(torch.ones(1, 1, 9), folder / "lm_head.pt")
    torch.save(torch.ones(7), folder / "other.pt")
    summary = run_import(trace, folder, tokens=tokens)
    assert rows_of(trace, "module, phase, step, position_start, position_count") == [
        ("flat", "prefill", 0, 0, 3),
        ("lm_head", "prefill", 0, 2, 1),
        ("other", "forward", 0, None, None),
        ("padded", "decode", 2, 4, 1),
        ("padded", "prefill", 0, 0, 3),
        ("whole", "prefill", 0, 0, 5),
    ]
    assert summary.notes == {"other.pt": "shape [7] has no axis of the prompts' lengths: no positions"}


def test_a_batch_of_all_prompts_and_files_by_prompt(trace: Trace, folder: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": [1, 2, 3]}, {"token_ids": [4, 5]}])
    torch.save(torch.ones(2, 4, 8), folder / "norm.pt")
    torch.save(torch.ones(1, 2, 8), folder / "prompt_1_mlp.pt")
    run_import(trace, folder, tokens=tokens)
    assert rows_of(trace, "module, prompt, position_count") == [("mlp", 1, 2), ("norm", 0, 3), ("norm", 1, 2)]


def test_ranks_in_file_names(trace: Trace, folder: Path) -> None:
    for rank in (0, 1):
        torch.save(torch.ones(1, 3, 4) * rank, folder / f"layers.0.mlp.up_proj.rank{rank}.pt")
    assert run_import(trace, folder).tp == 2
    assert rows_of(trace, "module, rank, mean") == [("layers.0.mlp.up_proj", 0, 0.0), ("layers.0.mlp.up_proj", 1, 1.0)]


def test_an_import_compares_with_another_import(trace: Trace, folder: Path, tmp_path: Path) -> None:
    from tensorsleuth.cli.app import main

    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": [1, 2, 3, 4, 5, 6]}])
    values = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    for run, scale in (("r", 0.0), ("b", 1e-3), ("t", 1e-3)):
        source = tmp_path / run
        source.mkdir()
        torch.save(values + scale * torch.randn(1, 6, 16), source / "norm.pt")
        import_dump(trace, source, run=run, role="target", options=ImportOptions(tokens=tokens))
    assert main(["compare", str(trace.path), "--reference", "r", "--baseline", "b", "--target", "t"]) == 0
