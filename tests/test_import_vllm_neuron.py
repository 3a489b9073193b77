"""Dumps of vLLM-Neuron's ModelCapture: every rank, requests and positions from the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_dumps import write_forward, write_tokens
from tensorsleuth.capture.importers import ImportOptions, ImportSummary, import_dump
from tensorsleuth.store import InputError, Trace

ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).bfloat16()


def run_import(trace: Trace, folder: Path, **options: Any) -> ImportSummary:
    return import_dump(trace, folder, run="t", role="target", options=ImportOptions(**options))


def rows_of(trace: Trace, columns: str, where: str = "true") -> list[tuple[Any, ...]]:
    query = f"SELECT {columns} FROM tensors WHERE {where} ORDER BY ALL"
    return [tuple(row.values()) for row in trace.query(query).to_pylist()]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """Two requests of 3 and 4 tokens prefilled together in a bucket of 10, then a decode step of both in one of 4."""
    folder = tmp_path / "served"
    for name, positions, size in (
        ("prefill_s10_0", [0, 1, 2, 0, 1, 2, 3, 3, 3, 3], 10),
        ("decode_b4_0", [3, 4, 4, 4], 4),
    ):
        tensors = {
            "model.norm": {0: ROWS[:size], 1: ROWS[:size]},
            "model.layers.0.self_attn.q_proj": {0: ROWS[:size, :4], 1: ROWS[:size, 4:]},
            "lm_head": {0: ROWS[:2, :4], 1: ROWS[:2, 4:]},
        }
        write_forward(folder, name, tensors, requests=["0", "1"], positions=positions)
    return folder


def test_requests_become_prompts_with_their_positions(trace: Trace, served: Path) -> None:
    summary = run_import(trace, served)
    assert (summary.format, summary.stack, summary.tp, summary.skipped) == ("vllm-neuron", "vllm-neuron", 2, {})
    columns = "prompt, phase, step, position_start, position_count, shape"
    assert rows_of(trace, columns, "module = 'model.norm' AND rank = 1") == [
        (0, "decode", 1, 3, 1, [1, 8]),
        (0, "prefill", 0, 0, 3, [3, 8]),
        (1, "decode", 1, 4, 1, [1, 8]),
        (1, "prefill", 0, 0, 4, [4, 8]),
    ]


def test_heads_hold_the_last_token_of_every_request(trace: Trace, served: Path) -> None:
    run_import(trace, served)
    assert rows_of(trace, "prompt, position_start, dims", "module = 'lm_head' AND rank = 0 AND step = 0") == [
        (0, 2, "(b s) e[tp]"),
        (1, 3, "(b s) e[tp]"),
    ]


def test_values_are_bit_identical_and_padding_is_gone(trace: Trace, served: Path, read: Any) -> None:
    run_import(trace, served)
    stored = read(trace, "module = 'model.layers.0.self_attn.q_proj' AND t.rank = 1 AND prompt = 1 AND step = 0")[0]
    assert stored.row["dims"] == "(b s) e[tp]"
    np.testing.assert_array_equal(stored.values.view(np.int16), ROWS[3:7, 4:].contiguous().view(torch.int16).numpy())


def test_ranks_that_should_agree_and_do_not_are_noted_but_not_marked(trace: Trace, tmp_path: Path) -> None:
    tensors = {"model.norm": {0: ROWS[:3], 1: ROWS[:3] + 1}}
    write_forward(tmp_path / "d", "prefill_s3_0", tensors, requests=["0"], positions=[0, 1, 2])
    summary = run_import(trace, tmp_path / "d")
    assert "ranks differ in a tensor that ranks should share" in summary.notes["dp0/prefill_s3_0/model.norm/rank0.pt"]
    assert rows_of(trace, "rank, dims") == [(0, "(b s) e"), (1, "(b s) e")]


def test_replicated_heads_are_one_shard_of_several_ranks(trace: Trace, tmp_path: Path) -> None:
    parts = {rank: ROWS[:3, 4 * (rank // 2) : 4 * (rank // 2) + 4] for rank in range(4)}
    tensors = {"layers.0.self_attn.k_proj": parts}
    write_forward(tmp_path / "d", "prefill_s3_0", tensors, requests=["0"], positions=[0, 1, 2])
    run_import(trace, tmp_path / "d")
    assert rows_of(trace, "DISTINCT dims") == [("(b s) e[tp/2]",)]


def test_sequence_parallel_ranks_hold_their_positions(trace: Trace, tmp_path: Path) -> None:
    tensors = {"norm": {0: ROWS[:4], 1: ROWS[4:8]}, "layers.0.mlp": {0: ROWS[:8], 1: ROWS[:8]}}
    write_forward(tmp_path / "d", "prefill_s8_0", tensors, requests=["0"], positions=[0, 1, 2, 3, 4, 5, 5, 5])
    run_import(trace, tmp_path / "d")
    assert rows_of(trace, "rank, position_start, position_count, dims", "module = 'norm'") == [
        (0, 0, 4, "(b s)[tp] e"),
        (1, 4, 2, "(b s)[tp] e"),
    ]


def test_chunks_of_a_prefill_continue_each_other(trace: Trace, tmp_path: Path) -> None:
    write_forward(tmp_path, "prefill_s4_0", {"norm": {0: ROWS[:4]}}, requests=["a"], positions=[0, 1, 2, 3])
    write_forward(tmp_path, "prefill_s4_1", {"norm": {0: ROWS[4:8]}}, requests=["a"], positions=[4, 5, 5, 5])
    write_forward(tmp_path, "decode_b1_0", {"norm": {0: ROWS[8:9]}}, requests=["a"], positions=[6])
    import_dump(trace, tmp_path, run="t", role="target", format="vllm-neuron")
    assert rows_of(trace, "position_start, position_count, phase, step") == [
        (0, 4, "prefill", 0),
        (4, 2, "prefill", 0),
        (6, 1, "decode", 1),
    ]


def test_reference_captures_recompute_the_whole_sequence(trace: Trace, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_forward(folder, "prefill_s3_0", {"norm": {0: ROWS[None, :3]}}, requests=["0"], positions=range(3))
    write_forward(folder, "decode_b4_0", {"norm": {0: ROWS[None, :4]}}, requests=["0"], positions=range(4))
    run_import(trace, folder)
    assert rows_of(trace, "step, position_start, position_count, dims") == [(0, 0, 3, "b s h"), (1, 0, 4, "b s h")]


def test_heads_of_attention_keep_their_axes(trace: Trace, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_forward(folder, "prefill_s3_0", {"x.q_norm": {0: ROWS[:3].view(3, 2, 4)}}, requests=["0"], positions=range(3))
    write_forward(folder, "decode_b1_0", {"x.q_norm": {0: ROWS[:1].view(1, 2, 4)}}, requests=["0"], positions=[3])
    run_import(trace, folder)
    assert rows_of(trace, "shape, dims, position_start") == [([1, 2, 4], "(b s) n d", 3), ([3, 2, 4], "(b s) n d", 0)]


def test_other_models_of_the_dump_have_names_of_their_own(trace: Trace, tmp_path: Path) -> None:
    for part in ("target", "draft", "vision"):
        write_forward(tmp_path / "d" / part, "prefill_s2_0", {"norm": {0: ROWS[:2]}}, requests=["0"], positions=[0, 1])
    run_import(trace, tmp_path / "d")
    assert rows_of(trace, "module") == [("draft.norm",), ("norm",), ("vision.norm",)]


def test_replicas_serve_different_requests(trace: Trace, tmp_path: Path) -> None:
    for replica in (0, 1):
        tensors = {"norm": {0: ROWS[replica : replica + 2]}, "moe": {0: ROWS[:4]}}
        write_forward(tmp_path / "d", "prefill_s2_0", tensors, requests=["0"], positions=[0, 1], replica=replica)
    summary = run_import(trace, tmp_path / "d")
    assert rows_of(trace, "prompt, module") == [(0, "norm"), (1, "norm")]
    assert "perhaps tokens of other data-parallel replicas" in summary.skipped["dp1/prefill_s2_0/moe/rank0.pt"]


def test_tokens_are_matched_by_request_id(trace: Trace, served: Path, tmp_path: Path) -> None:
    lines = [{"id": "1", "token_ids": [4, 5, 6, 7, 8], "n_prompt": 4}, {"id": "0", "token_ids": [1, 2, 3, 9]}]
    summary = run_import(trace, served, tokens=write_tokens(tmp_path / "t.jsonl", lines))
    assert "tokens were matched by request id" in summary.assumptions
    manifest = trace.manifest("t")
    assert [(p.id, p.n_tokens) for p in manifest.prompts] == [("0", 3), ("1", 4)]
    assert [t.token_ids for t in manifest.tokens] == [(1, 2, 3, 9), (4, 5, 6, 7, 8)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"token_ids": [1, 2, 3]}], "the tokens hold 1 prompts, the dump 2 requests"),
        ([{"token_ids": [1, 2, 3, 4], "n_prompt": 4}] * 2, "request 0 prefilled 3 tokens, prompt '0' has 4"),
    ],
)
def test_tokens_of_other_requests_are_refused(
    trace: Trace, served: Path, tmp_path: Path, lines: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_import(trace, served, tokens=write_tokens(tmp_path / "t.jsonl", lines))


def test_a_rank_that_is_missing_is_named(trace: Trace, served: Path) -> None:
    gone = "dp0/decode_b4_0/model.norm/rank0.pt"
    (served / gone).unlink()
    summary = run_import(trace, served)
    assert summary.skipped == {gone: "missing: the dump has 2 ranks, this module lacks rank 0"}


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        (None, "missing: its tensors are stored without prompt and positions"),
        ("{", "cannot be used"),
        ('{"req_ids": [], "positions": [0]}', "no request ids"),
        ('{"req_ids": ["0"], "positions": [0, 1, 2, 0, 1]}', "more runs of consecutive positions than the 1 requests"),
        ('{"req_ids": ["0", "1"], "positions": [0, 1, 2]}', "1 runs of consecutive positions for 2 requests"),
        ('{"req_ids": ["0"], "positions": "x"}', "cannot be used"),
    ],
)
def test_metadata_that_cannot_be_used_costs_the_positions(
    trace: Trace, tmp_path: Path, meta: str | None, reason: str
) -> None:
    place = write_forward(tmp_path / "d", "prefill_s3_0", {"norm": {0: ROWS[:3]}}, requests=["0"], positions=range(3))
    path = place / "prefill_s3_0_meta.json"
    path.unlink() if meta is None else path.write_text(meta)
    summary = run_import(trace, tmp_path / "d")
    assert reason in summary.skipped["dp0/prefill_s3_0/prefill_s3_0_meta.json"]
    assert rows_of(trace, "prompt, position_start, shape") == [(None, None, [3, 8])]


def test_speculative_decoding_computes_several_tokens_a_step(trace: Trace, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_forward(folder, "prefill_s4_0", {"n": {0: ROWS[:4]}}, requests=["0", "1"], positions=[0, 1, 0, 1])
    write_forward(folder, "decode_b6_0", {"n": {0: ROWS[:6]}}, requests=["0", "1"], positions=[2, 3, 4, 2, 3, 4])
    run_import(trace, folder)
    assert rows_of(trace, "prompt, position_start, position_count", "phase = 'decode'") == [(0, 2, 3), (1, 2, 3)]


def test_metadata_beside_the_forward_pass_is_found_too(trace: Trace, tmp_path: Path) -> None:
    place = write_forward(tmp_path / "d", "prefill_s3_0", {"norm": {0: ROWS[:3]}}, requests=["r"], positions=range(3))
    path = place / "prefill_s3_0_meta.json"
    (place.parent / path.name).write_text(json.dumps({"request_ids": ["r"], "positions": [0, 1, 2]}))
    path.unlink()
    assert run_import(trace, tmp_path / "d").positions == 1
