"""Known defects of NxD Inference's captures: each is recognised and reported, or imported with a note."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from import_dumps import HIDDEN, HookDump, write_tokens
from tensorsleuth.capture.importers import ImportOptions, ImportSummary, import_dump
from tensorsleuth.store import InputError, Trace

PROMPT, FED = [3, 4, 5, 6, 7], [11, 12]


@pytest.fixture
def dump(tmp_path: Path) -> HookDump:
    """One prompt with two decode steps; `step` is 3 afterwards."""
    written = HookDump(tmp_path / "dump")
    written.generate([PROMPT], [FED], modules=["embed_tokens", "norm"])
    return written


def run_import(trace: Trace, dump: HookDump, *, ids: Sequence[int] = (*PROMPT, *FED), **options: Any) -> ImportSummary:
    tokens = write_tokens(dump.folder.parent / "tokens.jsonl", [{"token_ids": list(ids), "n_prompt": len(PROMPT)}])
    return import_dump(trace, dump.folder, run="t", role="target", options=ImportOptions(tokens=tokens, **options))


def cosines(start: int, count: int, width: int = HIDDEN, factor: float = 1.0) -> torch.Tensor:
    angles = torch.arange(start, start + count)[:, None] / 10000 ** (torch.arange(width // 2) / (width // 2))
    return (torch.cat((angles, angles), -1).cos() * factor).bfloat16()[None]


@pytest.mark.parametrize("factor", [1.0, 1.2079], ids=["plain", "scaled"])
def test_a_cosine_table_is_not_an_attention_output(trace: Trace, dump: HookDump, factor: float) -> None:
    for dump.step, (start, count) in zip((1, 2, 3), ((0, 8), (5, 1), (6, 1)), strict=True):
        dump.save("layers.0.self_attn", cosines(start, count, factor=factor))
        dump.save("layers.1.self_attn", torch.randn(1, count, HIDDEN).bfloat16())
    summary = run_import(trace, dump)
    assert {name for name, reason in summary.skipped.items() if "cos_cache" in reason} == {
        f"captured_tensors_{label}_module_layers.0.self_attn_output.pt"
        for label in ("cte_step_1", "tkg_step_2", "tkg_step_3")
    }
    assert "o_proj" in next(iter(summary.skipped.values()))
    assert trace.query("SELECT DISTINCT module FROM tensors WHERE module LIKE '%self_attn'")["module"].to_pylist() == [
        "layers.1.self_attn"
    ]


def test_cosines_without_repeated_halves_are_known_by_position_zero_and_then_in_every_step(
    trace: Trace, dump: HookDump
) -> None:
    for dump.step, (start, count) in zip((1, 2), ((0, 8), (5, 1)), strict=True):
        dump.save("layers.0.self_attn", cosines(start, count, 2 * HIDDEN)[..., :HIDDEN])
    cosine = [name for name, reason in run_import(trace, dump).skipped.items() if "cos_cache" in reason]
    assert [name.partition("_module")[0] for name in cosine] == [
        "captured_tensors_cte_step_1",
        "captured_tensors_tkg_step_2",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_single_zero_stands_for_a_module_that_recorded_nothing(
    trace: Trace, dump: HookDump, dtype: torch.dtype
) -> None:
    """In CPU mode the registry forgets its modules: from step 2 on every module is such a zero."""
    dump.step = 1
    dump.save("layers.0.mlp", torch.randn(1, 8, 4))
    for dump.step in (2, 3):
        dump.save("layers.0.mlp", torch.zeros(1, dtype=dtype))
    summary = run_import(trace, dump)
    reasons = list(summary.skipped.values())
    assert len(reasons) == 2
    assert all("placeholder: a single zero, written when layers.0.mlp recorded nothing" in reason for reason in reasons)


def test_a_single_nan_stands_for_an_unused_manual_slot(trace: Trace, dump: HookDump) -> None:
    """Also what the slot that `auto_capture_moe_tensors` reserves and nothing fills looks like."""
    nan = torch.full((1,), float("nan")).bfloat16()
    path = dump.write("captured_tensors_cte_step_1_manual_tensor_0.pt", nan)
    assert "a NaN in a slot for manual tensors" in run_import(trace, dump).skipped[path.name]


@pytest.mark.parametrize(
    ("module", "width", "note"), [("self_attn.qkv_proj", 16, "Q only"), ("mlp.router", 4, "router logits only")]
)
def test_the_first_of_a_tuple_is_imported_as_slot_0(
    trace: Trace, dump: HookDump, module: str, width: int, note: str
) -> None:
    dump.step = 1
    path = dump.save(f"layers.0.{module}", torch.randn(1, 8, width))
    assert note in run_import(trace, dump).notes[path.name]
    assert trace.query(f"SELECT slot FROM tensors WHERE module = 'layers.0.{module}'")["slot"].to_pylist() == ["0"]


def test_rows_selected_by_sequence_in_a_flattened_router_tensor(trace: Trace, tmp_path: Path) -> None:
    """A whole `[batch * length, experts]` tensor is fine; one row per sequence is what `index_select` left of it."""
    dump = HookDump(tmp_path / "dump")
    dump.generate([PROMPT], [FED], modules=["embed_tokens", "norm"])
    dump.step = 1
    whole = torch.randn(8, 4)
    dump.save("layers.0.mlp.router.linear_router", whole)
    path = dump.save("layers.1.mlp.router.linear_router", whole[:1])
    summary = run_import(trace, dump)
    assert summary.skipped[path.name].startswith("holds 1 of 8 tokens: NxD Inference selected sequences by row")
    row = trace.query("SELECT dims, shape FROM tensors WHERE module LIKE 'layers.0%'").to_pylist()[0]
    assert row == {"dims": "(b s) e", "shape": [5, 4]}


def test_a_decode_step_saved_over_the_prefill_is_recognised(trace: Trace, tmp_path: Path) -> None:
    """A wrapper that saves every forward pass as `cte_step_1` leaves the last one under that name."""
    dump = HookDump(tmp_path / "dump", metadata=False)
    dump.step = 1
    dump.save("norm", torch.randn(1, 1, HIDDEN))
    with pytest.raises(InputError, match="decode step that was saved over the prefill"):
        run_import(trace, dump)
    assert trace.run_names() == []


def test_files_of_an_earlier_generation_are_told_by_their_age(trace: Trace, dump: HookDump) -> None:
    """`set_tensor_capture_step(0)` restarts the counter: a shorter generation overwrites the first files only."""
    dump.step = 0
    dump.generate([PROMPT], [FED[:1]], modules=["embed_tokens", "norm"])
    summary = run_import(trace, dump)
    assert {name for name, reason in summary.skipped.items() if "left over from an earlier generation" in reason} == {
        f"captured_tensors_tkg_step_3_module_{module}_output.pt" for module in ("embed_tokens", "norm")
    }
    assert trace.query("SELECT max(step) AS last FROM tensors")["last"].to_pylist() == [1]


def test_both_names_of_one_tensor_are_a_duplicate(trace: Trace, dump: HookDump) -> None:
    dump.step = 1
    path = dump.save("norm", torch.randn(1, 8, HIDDEN), suffix="_0")
    reason = run_import(trace, dump).skipped[path.name]
    assert reason.startswith("duplicate: captured_tensors_cte_step_1_module_norm_output.pt holds the same site")


def test_missing_files_are_named(trace: Trace, dump: HookDump) -> None:
    gone = dump.folder / "captured_tensors_tkg_step_2_module_norm_output.pt"
    gone.unlink()
    listed = dict(dump.entries)
    del dump.entries[gone.name]
    (dump.folder / "capture_metadata.json").write_text(json.dumps({"tensors": dump.entries}))
    assert run_import(trace, dump).skipped == {gone.name: "missing: other steps have this site"}
    (dump.folder / "capture_metadata.json").write_text(json.dumps({"tensors": listed | {"../../etc/x\0.pt": {}}}))
    tokens = dump.folder.parent / "tokens.jsonl"
    again = import_dump(trace, dump.folder, run="u", role="target", options=ImportOptions(tokens=tokens))
    assert again.skipped[gone.name] == "missing: capture_metadata.json lists it"
    assert again.skipped["../../etc/x\\x00.pt"] == "missing: capture_metadata.json lists it"


def test_half_written_metadata_does_not_matter(trace: Trace, dump: HookDump) -> None:
    """The hook rewrites the whole file after every tensor; a killed process leaves half of it."""
    path = dump.folder / "capture_metadata.json"
    path.write_text(path.read_text()[:-40])
    summary = run_import(trace, dump)
    assert summary.skipped["capture_metadata.json"].startswith("cannot be read (JSONDecodeError)")
    assert summary.n_tensors == 6


def test_a_file_that_is_not_what_the_metadata_says_is_left_out(trace: Trace, dump: HookDump) -> None:
    shape = dump.folder / "captured_tensors_cte_step_1_module_norm_output.pt"
    dtype = dump.folder / "captured_tensors_tkg_step_2_module_norm_output.pt"
    torch.save(torch.randn(1, 8, 3).bfloat16(), shape)
    torch.save(torch.randn(1, 1, HIDDEN), dtype)
    skipped = run_import(trace, dump).skipped
    assert skipped[shape.name] == "holds shape [1, 8, 3], capture_metadata.json says [1, 8, 16]"
    assert skipped[dtype.name] == "holds torch.float32, capture_metadata.json says torch.bfloat16"
