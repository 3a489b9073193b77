"""Dumps of NxD Inference's hook: prompts, phases, positions and tokens come back from files that hold none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from import_dumps import HIDDEN, MODULES, HookDump, hidden_states, write_tokens
from tensorsleuth.capture.importers import ImportOptions, import_dump
from tensorsleuth.capture.pending import to_numpy
from tensorsleuth.store import InputError, PromptTokens, RunExistsError, Trace, verify

Read = Callable[..., list[Any]]
PROMPTS = [[3, 4, 5, 6, 7], [8, 9, 10]]
FED = [[11, 12], [14, 15]]
AFTER = [[13], [16]]


@pytest.fixture
def dump(tmp_path: Path) -> HookDump:
    """Two prompts one after the other, two decode steps each: steps 1 to 6."""
    written = HookDump(tmp_path / "dump")
    for prompt, fed in zip(PROMPTS, FED, strict=True):
        written.generate([prompt], [fed])
    return written


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    lines = [{"token_ids": p + f + a, "n_prompt": len(p)} for p, f, a in zip(PROMPTS, FED, AFTER, strict=True)]
    return write_tokens(tmp_path / "tokens.jsonl", lines)


def expected(module: str, prompt: int, step: int) -> np.ndarray[Any, Any]:
    ids, start = (PROMPTS[prompt], 0) if step == 0 else (FED[prompt][step - 1 : step], len(PROMPTS[prompt]) + step - 1)
    values = to_numpy(hidden_states(module, ids, start))
    return values[:, -1:] if module == "lm_head" else values


def run_import(trace: Trace, dump: HookDump, **options: Any) -> Any:
    return import_dump(trace, dump.folder, run="t", role="target", options=ImportOptions(**options))


def assert_right(trace: Trace, read: Read) -> None:
    """Every tensor of both prompts is where it belongs, bit for bit."""
    rows = read(trace, "run = 't'")
    assert len(rows) == 6 * len(MODULES)
    for stored in rows:
        row = stored.row
        assert row["phase"] == ("prefill" if row["step"] == 0 else "decode")
        wanted = expected(row["module"], row["prompt"], row["step"])
        length = len(PROMPTS[row["prompt"]])
        first = length + row["step"] - 1 if row["step"] or row["module"] == "lm_head" else 0
        assert (row["position_start"], row["position_count"]) == (first, wanted.shape[1])
        assert stored.values.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored.values.view(np.uint16), wanted.view(np.uint16))


def test_prompts_phases_and_positions_come_back(trace: Trace, dump: HookDump, tokens: Path, read: Read) -> None:
    summary = run_import(trace, dump, tokens=tokens)
    assert (summary.format, summary.stack, summary.n_prompts) == ("nxdi", "nxdi", 2)
    assert summary.skipped == {}
    assert_right(trace, read)
    manifest = trace.manifest("t")
    assert (manifest.status, manifest.stack, manifest.dtype) == ("complete", "nxdi", "bfloat16")
    assert [(p.n_tokens, t.token_ids) for p, t in zip(manifest.prompts, manifest.tokens, strict=True)] == [
        (len(p), (*p, *f, *a)) for p, f, a in zip(PROMPTS, FED, AFTER, strict=True)
    ]
    assert verify(trace).problems == ()


def test_a_second_prefill_is_labelled_decode_and_recognised(trace: Trace, dump: HookDump, tokens: Path) -> None:
    summary = run_import(trace, dump, tokens=tokens)
    name = "captured_tensors_tkg_step_4_module_norm_output.pt"
    assert summary.notes[name] == "labelled tkg, imported as a prefill (step 0)"
    assert any("step 4 is labelled tkg but computes 8 positions" in line for line in summary.assumptions)


def test_sites_are_in_the_order_of_execution(trace: Trace, dump: HookDump, tokens: Path) -> None:
    run_import(trace, dump, tokens=tokens)
    order = trace.query("SELECT module FROM tensors WHERE step = 0 AND prompt = 0 ORDER BY exec_order")["module"]
    assert order.to_pylist() == list(MODULES)


def test_prompt_lengths_follow_from_the_number_of_decode_steps(
    trace: Trace, dump: HookDump, tmp_path: Path, read: Read
) -> None:
    lines = [{"token_ids": p + f + a} for p, f, a in zip(PROMPTS, FED, AFTER, strict=True)]
    summary = run_import(trace, dump, tokens=write_tokens(tmp_path / "t.jsonl", lines))
    assert_right(trace, read)
    assert any('gives no "n_prompt": its first 5 of 8 tokens' in line for line in summary.assumptions)


def test_tokens_in_another_order_are_matched_by_the_embedding(
    trace: Trace, dump: HookDump, tmp_path: Path, read: Read
) -> None:
    lines = [{"token_ids": p + f, "n_prompt": len(p), "id": str(p)} for p, f in zip(PROMPTS, FED, strict=True)]
    summary = run_import(trace, dump, tokens=write_tokens(tmp_path / "t.jsonl", lines[::-1]))
    assert any("matched by their embedding rows" in line for line in summary.assumptions)
    assert [p.id for p in trace.manifest("t").prompts] == [str(p) for p in PROMPTS]
    assert_right(trace, read)


def test_tokens_of_other_prompts_are_refused(trace: Trace, dump: HookDump, tmp_path: Path) -> None:
    lines = [{"token_ids": [5, 5, 6, 7, 8]}, {"token_ids": [9, 9, 9]}]
    with pytest.raises(InputError, match="do not belong to this dump"):
        run_import(trace, dump, tokens=write_tokens(tmp_path / "t.jsonl", lines))
    assert trace.run_names() == []


def test_lengths_are_not_guessed(trace: Trace, tmp_path: Path) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([PROMPTS[0]], [FED[0]], modules=["norm"])
    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": PROMPTS[0] + FED[0] + AFTER[0]}])
    with pytest.raises(InputError, match=r"cannot be told from the dump .* add \"n_prompt\""):
        run_import(trace, dump, tokens=tokens)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"token_ids": [3]}], "the tokens hold 1 prompts, the dump 2 .prefills at steps 1, 4."),
        ([{"token_ids": [3] * 9, "n_prompt": 9}, {"token_ids": [3]}], "has 9 tokens, but the prefill at step 1 has"),
        ([{"token_ids": [1]}] * 3, "give the tokens of exactly these prompts"),
        ([{"text": "hello"}], 'needs "token_ids"'),
        ([{"token_ids": [3, 4], "n_prompt": 3}], '"n_prompt" must be a number from 1 to 2'),
    ],
)
def test_tokens_that_cannot_be_right_are_refused(
    trace: Trace, dump: HookDump, tmp_path: Path, lines: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_import(trace, dump, tokens=write_tokens(tmp_path / "t.jsonl", lines))
    assert trace.run_names() == []


def test_tokens_of_another_run_are_matched_by_value(trace: Trace, tmp_path: Path, tokens: Path, read: Read) -> None:
    """The reference ran three prompts in another order; all have distinct tokens, so that only values tell."""
    other = HookDump(tmp_path / "reference")
    for prompt, fed in ([[21, 22, 23], [24, 25]], [PROMPTS[1], FED[1]], [PROMPTS[0], FED[0]]):
        other.generate([prompt], [fed])
    lines = [
        {"token_ids": [21, 22, 23, 24, 25, 26], "n_prompt": 3},
        *({"token_ids": PROMPTS[i] + FED[i] + AFTER[i], "n_prompt": len(PROMPTS[i])} for i in (1, 0)),
    ]
    write_tokens(tokens, lines)
    import_dump(trace, other.folder, run="r", role="reference", options=ImportOptions(tokens=tokens))
    dump = HookDump(tmp_path / "dump")
    for prompt, fed in zip(PROMPTS, FED, strict=True):
        dump.generate([prompt], [fed])
    summary = run_import(trace, dump, tokens_from="r")
    assert any("matched by their embedding rows" in line for line in summary.assumptions)
    assert trace.manifest("t").tokens[0] == PromptTokens(0, (*PROMPTS[0], *FED[0], *AFTER[0]))
    assert_right(trace, read)


def test_the_tokens_end_where_the_dump_chose_another_one(trace: Trace, dump: HookDump, tmp_path: Path) -> None:
    lines = [
        {"token_ids": [*PROMPTS[0], 11, 4, 13], "n_prompt": 5},
        {"token_ids": [*PROMPTS[1], *FED[1], 16], "n_prompt": 3},
    ]
    summary = run_import(trace, dump, tokens=write_tokens(tmp_path / "t.jsonl", lines))
    assert any("step 3 computed another token than given for position 6" in line for line in summary.assumptions)
    assert [t.token_ids for t in trace.manifest("t").tokens] == [(*PROMPTS[0], 11), (*PROMPTS[1], *FED[1], 16)]


def test_without_tokens_the_embedding_shows_where_padding_begins(trace: Trace, dump: HookDump, read: Read) -> None:
    summary = run_import(trace, dump)
    assert any("their lengths are 5, 3" in line for line in summary.assumptions)
    assert summary.n_prompts == 0
    assert_right(trace, read)


def test_without_tokens_and_embedding_there_are_no_positions(trace: Trace, tmp_path: Path, read: Read) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([PROMPTS[0]], [FED[0]], modules=MODULES[1:])
    summary = run_import(trace, dump)
    assert summary.positions == 0
    assert any("stored without positions" in line for line in summary.assumptions)
    assert any("stored without positions" in line for line in trace.manifest("t").provenance["import"]["assumptions"])
    assert {s.row["position_start"] for s in read(trace)} == {None}
    assert read(trace, "module = 'norm' AND phase = 'prefill'")[0].values.shape == (1, 8, HIDDEN)


def test_a_batch_is_cut_by_prompt(trace: Trace, tmp_path: Path, tokens: Path, read: Read) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate(PROMPTS, FED)
    run_import(trace, dump, tokens=tokens)
    assert_right(trace, read)


def test_rows_without_a_prompt_only_pad_the_batch(trace: Trace, tmp_path: Path, tokens: Path) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([*PROMPTS, [30, 31]], [*FED, [32, 33]])
    summary = run_import(trace, dump, tokens=tokens)
    assert any("last 1 rows of the batch hold no prompt" in line for line in summary.assumptions)
    assert set(trace.query("SELECT DISTINCT prompt FROM tensors")["prompt"].to_pylist()) == {0, 1}


def test_a_prompt_of_one_token_is_told_by_the_tokens(trace: Trace, tmp_path: Path) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([PROMPTS[0]], [FED[0]])
    dump.bucket = 1
    dump.generate([[20]], [[21]])
    lines = [{"token_ids": PROMPTS[0] + FED[0], "n_prompt": 5}, {"token_ids": [20, 21], "n_prompt": 1}]
    run_import(trace, dump, tokens=write_tokens(tmp_path / "t.jsonl", lines))
    rows = trace.query(
        "SELECT prompt, phase, step, position_start FROM tensors WHERE module = 'norm' ORDER BY prompt, step"
    ).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (0, "prefill", 0, 0),
        (0, "decode", 1, 5),
        (0, "decode", 2, 6),
        (1, "prefill", 0, 0),
        (1, "decode", 1, 1),
    ]


def test_steps_that_were_not_saved_keep_their_positions(trace: Trace, dump: HookDump, tokens: Path) -> None:
    """`capture_indices=[3, 4]`: the last decode step of the first prompt and the prefill of the second."""
    for path in dump.folder.glob("*_step_[1256]_*"):
        path.unlink()
        del dump.entries[path.name]
    (dump.folder / "capture_metadata.json").write_text(json.dumps({"tensors": dump.entries}))
    summary = run_import(trace, dump, tokens=tokens)
    assert any("steps 1 to 2 were not saved" in line for line in summary.assumptions)
    rows = trace.query("SELECT prompt, phase, step, position_start FROM tensors WHERE module = 'norm' ORDER BY prompt")
    assert [tuple(row.values()) for row in rows.to_pylist()] == [(0, "decode", 2, 6), (1, "prefill", 0, 0)]


def test_inputs_and_manual_tensors_have_sites(trace: Trace, tmp_path: Path, tokens: Path) -> None:
    dump = HookDump(tmp_path / "dump")
    dump.generate([PROMPTS[0]], [[]])
    dump.save("layers.0.mlp", torch.ones(1, 8, 4), port="input")
    dump.write("captured_tensors_cte_step_1_manual_tensor_0.pt", torch.ones(1, 8, 4))
    write_tokens(tokens, [{"token_ids": PROMPTS[0]}])
    run_import(trace, dump, tokens=tokens)
    query = "SELECT module, port, shape FROM tensors WHERE port = 'input' OR module LIKE 'manual%' ORDER BY ALL"
    assert [tuple(row.values()) for row in trace.query(query).to_pylist()] == [
        ("layers.0.mlp", "input", [1, 5, 4]),
        ("manual.0", "output", [1, 5, 4]),
    ]


def test_the_equivalence_layout_is_told_from_the_hooks(trace: Trace, tmp_path: Path, tokens: Path, read: Read) -> None:
    dump = HookDump(tmp_path / "dump", decode="tg", metadata=False)
    for prompt, fed in zip(PROMPTS, FED, strict=True):
        dump.generate([prompt], [fed])
    for path in dump.folder.glob("*.mlp_output.pt"):
        path.rename(path.with_name(path.name.replace("_output.pt", "_output_0.pt")))
    summary = run_import(trace, dump, tokens=tokens)
    assert (summary.format, summary.stack) == ("equivalence", "import")
    assert {s.row["slot"] for s in read(trace, "module = 'layers.0.mlp'")} == {"0"}
    assert_right(trace, read)


def test_a_reference_dump_without_padding_needs_no_lengths(trace: Trace, tmp_path: Path) -> None:
    dump = HookDump(tmp_path / "dump", bucket=5, metadata=False)
    dump.generate([PROMPTS[0]], [[]])
    tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": PROMPTS[0]}])
    assert run_import(trace, dump, tokens=tokens).positions == len(MODULES)


class TestRanks:
    """The hook saves rank 0 only: shards are marked, and the missing ranks named."""

    def dims(self, trace: Trace) -> dict[str, str]:
        rows = trace.query(
            "SELECT module || ':' || port AS site, dims FROM tensors WHERE phase = 'prefill'"
        ).to_pylist()
        return {row["site"]: row["dims"] for row in rows}

    def test_column_parallel_outputs_are_shards(self, trace: Trace, dump: HookDump, tokens: Path) -> None:
        dump.step = 1
        dump.save("layers.0.self_attn.qkv_proj", torch.ones(1, 8, 4))
        dump.save("layers.0.mlp.gate_proj", torch.ones(1, 8, 4))
        dump.save("layers.0.self_attn.o_proj", torch.ones(1, 8, 4), port="input")
        summary = run_import(trace, dump, tokens=tokens, tp=4)
        dims = self.dims(trace)
        assert dims["layers.0.self_attn.qkv_proj:output"] == "b s h[tp]"
        assert dims["layers.0.mlp.gate_proj:output"] == dims["layers.0.self_attn.o_proj:input"] == "b s h[tp]"
        assert dims["lm_head:output"] == "b s h[tp]"
        assert dims["layers.0.self_attn.o_proj:output"] == dims["norm:output"] == "b s h"
        note = summary.notes["captured_tensors_cte_step_1_module_layers.0.mlp.gate_proj_output.pt"]
        assert note == "rank 0's shard only; the other 3 ranks are missing"
        assert trace.manifest("t").tp == 4

    def test_a_gathered_head_is_told_by_its_width_in_the_other_run(
        self, trace: Trace, dump: HookDump, tokens: Path
    ) -> None:
        import_dump(trace, dump.folder, run="r", role="reference", options=ImportOptions(tokens=tokens))
        run_import(trace, dump, tokens_from="r", tp=2)
        query = "SELECT DISTINCT dims FROM tensors WHERE run = 't' AND module = 'lm_head'"
        assert trace.query(query)["dims"].to_pylist() == ["b s h"]

    @pytest.mark.parametrize(("rank", "expected"), [(0, (0, 4)), (1, (4, 1))])
    def test_sequence_parallel_tensors_hold_a_part_of_the_positions(
        self, trace: Trace, tmp_path: Path, rank: int, expected: tuple[int, int]
    ) -> None:
        dump = HookDump(tmp_path / "dump")
        dump.generate([PROMPTS[0]], [[]])
        values = torch.arange(8.0)[None, :, None].expand(1, 8, 3)[:, 4 * rank : 4 * rank + 4]
        dump.save("layers.0.input_layernorm", values)
        tokens = write_tokens(tmp_path / "t.jsonl", [{"token_ids": PROMPTS[0]}])
        run_import(trace, dump, tokens=tokens, tp=2, rank=rank)
        row = trace.query("SELECT * FROM tensors WHERE module LIKE '%input_layernorm'").to_pylist()[0]
        assert (row["position_start"], row["position_count"]) == expected
        assert (row["dims"], row["rank"], row["min"]) == ("b s[tp] h", rank, expected[0])


def test_a_run_name_that_is_taken_is_refused_before_reading(trace: Trace, dump: HookDump, tokens: Path) -> None:
    run_import(trace, dump, tokens=tokens)
    with pytest.raises(RunExistsError, match="already has a run 't'"):
        run_import(trace, dump, tokens=tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": Path("a"), "tokens_from": "b"}, "either --tokens or --tokens-from"),
        ({"tp": 2, "rank": 2}, "rank 2 of 2 is not possible"),
        ({"tokens": Path("missing.jsonl")}, "cannot be read"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    trace: Trace, dump: HookDump, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_import(trace, dump, **options)
