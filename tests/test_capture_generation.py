"""Captures of small causal language models: decoding, batches, teacher forcing, observer effect and plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorsleuth.capture.generate import Generation, padded, positions_of
from tensorsleuth.capture.hf import ModelSource, load_model
from tensorsleuth.capture.hf_run import CaptureSummary, HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.prompts import EncodedPrompt, PromptInput
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import InputError, Trace, verify
from tensorsleuth.store.dims import by_position
from tensorsleuth.store.manifest import write_manifest

ModelFolder = Callable[[str], Path]
PROMPTS = tuple(
    PromptInput(str(n), token_ids=tuple((7 * n + 3 * i) % 61 + 1 for i in range(length)))
    for n, length in enumerate((3, 6, 4))
)
Key = tuple[int, int, str, str, str, int]


def capture(trace: Trace, folder: Path, run: str, **options: Any) -> CaptureSummary:
    options = {"role": "reference", "prompts": PROMPTS, **options}
    return capture_hugging_face(trace, HuggingFaceCapture(ModelSource(folder, seed=1), run, **options))


def vectors(read: Any, trace: Trace, run: str) -> dict[Key, np.ndarray[Any, Any]]:
    """Every position of every site: (prompt, position, module, port, slot, call) to its values."""
    found: dict[Key, np.ndarray[Any, Any]] = {}
    for tensor in read(trace, f"run = '{run}' AND position_start IS NOT NULL"):
        row = tensor.row
        for offset, vector in enumerate(by_position(tensor.values, row["dims"])):
            position = row["position_start"] + offset
            key = (row["prompt"], position, row["module"], row["port"], row["slot"], row["call"])
            assert key not in found
            found[key] = vector
    return found


def fed(trace: Trace, run: str) -> list[tuple[int, ...]]:
    return [item.token_ids for item in trace.manifest(run).tokens]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_prefill_and_decode_agree_with_one_prefill_of_everything(
    trace: Trace, read: Any, model_folder: ModelFolder, architecture: str
) -> None:
    folder = model_folder(architecture)
    capture(trace, folder, "steps", generation=Generation(new_tokens=4))
    whole = tuple(PromptInput(str(n), token_ids=tokens[:-1]) for n, tokens in enumerate(fed(trace, "steps")))
    capture(trace, folder, "whole", prompts=whole)
    steps, full = vectors(read, trace, "steps"), vectors(read, trace, "whole")
    assert steps.keys() == full.keys()
    assert {position for prompt, position, *_ in steps if prompt == 1} == set(range(9))
    for key, vector in steps.items():
        np.testing.assert_allclose(vector, full[key], rtol=1e-4, atol=2e-6, err_msg=str(key))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_padded_batch_agrees_with_one_by_one_runs(
    trace: Trace, read: Any, model_folder: ModelFolder, architecture: str, padding: Any
) -> None:
    folder = model_folder(architecture)
    generation = Generation(new_tokens=3)
    capture(trace, folder, "single", generation=generation)
    capture(trace, folder, "batch", generation=Generation(new_tokens=3, batch_size=3, padding=padding))
    assert fed(trace, "single") == fed(trace, "batch")
    columns = "prompt, phase, step, module, port, slot, dims, position_start, position_count, shape, n_nan"
    select = f"SELECT {columns} FROM tensors WHERE position_start IS NOT NULL AND run = ? ORDER BY ALL"
    single, batch = trace.query(select, ["single"]), trace.query(select, ["batch"])
    assert single.equals(batch)
    assert set(batch.column("n_nan").to_pylist()) == {0}
    alone, together = vectors(read, trace, "single"), vectors(read, trace, "batch")
    assert alone.keys() == together.keys()
    for key, vector in together.items():
        np.testing.assert_allclose(vector, alone[key], rtol=1e-4, atol=2e-6, err_msg=str(key))


def test_prompts_of_a_batch_stop_on_their_own(trace: Trace, read: Any, model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    capture(trace, folder, "teacher", generation=Generation(new_tokens=5))
    manifest = trace.manifest("teacher")
    lengths = (1, 4, 2)  # a teacher whose prompts went on for different numbers of tokens
    shortened = [
        replace(item, token_ids=item.token_ids[: prompt.n_tokens + n])
        for item, prompt, n in zip(manifest.tokens, manifest.prompts, lengths, strict=True)
    ]
    write_manifest(trace.run_folder("teacher"), replace(manifest, tokens=tuple(shortened)))
    summary = capture(trace, folder, "pupil", prompts=(), teacher="teacher", generation=Generation(batch_size=3))
    last = trace.query(
        "SELECT prompt, max(step) AS step, sum(position_count) AS n FROM tensors"
        " WHERE run = 'pupil' AND module = 'lm_head' AND port = 'output' GROUP BY prompt ORDER BY prompt"
    ).to_pylist()
    assert [row["step"] for row in last] == [0, 3, 1]
    assert [row["n"] for row in last] == [3, 6 + 3, 4 + 1]
    assert summary.plan is not None
    assert (summary.plan.n_tensors, summary.plan.nbytes) == (summary.n_tensors, summary.nbytes)


def test_teacher_forcing_feeds_exactly_the_teachers_tokens(trace: Trace, read: Any, model_folder: ModelFolder) -> None:
    capture(trace, model_folder("llama"), "teacher", generation=Generation(new_tokens=4))
    other = HuggingFaceCapture(
        ModelSource(model_folder("llama"), seed=2), "pupil", "target", teacher="teacher", dtype="bfloat16"
    )
    capture_hugging_face(trace, other)
    assert fed(trace, "pupil") == fed(trace, "teacher")
    ids = {run: {} for run in ("teacher", "pupil")}  # type: ignore[var-annotated]
    for run, found in ids.items():
        for row in trace.query(f"SELECT * FROM tokens WHERE run = '{run}'").to_pylist():
            found[row["prompt"], row["position"]] = row["token_id"]
    assert ids["teacher"] == ids["pupil"]
    embedded = read(trace, "module = 'model.embed_tokens' AND run = 'pupil' AND port = 'output'")
    weights = load_model(ModelSource(model_folder("llama"), seed=2), torch.bfloat16).get_input_embeddings().weight
    for tensor in embedded:
        row = tensor.row
        for offset, vector in enumerate(tensor.values[0]):
            token = ids["teacher"][row["prompt"], row["position_start"] + offset]
            np.testing.assert_array_equal(vector.astype(np.float32), weights[token].detach().float().numpy())
    forced = trace.query("SELECT min(position) FILTER (forced) AS p FROM tokens WHERE run = 'pupil' GROUP BY prompt")
    assert sorted(forced.column("p").to_pylist()) == [3, 4, 6]
    assert trace.query("SELECT count(*) AS n FROM tokens WHERE run = 'teacher' AND forced").column(0).to_pylist() == [0]


def test_a_teacher_that_did_not_run_a_prompt_is_refused(trace: Trace, model_folder: ModelFolder) -> None:
    capture(trace, model_folder("llama"), "teacher", prompts=PROMPTS[:1])
    with pytest.raises(InputError, match="prompt '1' was not run by 'teacher'"):
        capture(trace, model_folder("llama"), "pupil", prompts=PROMPTS[:2], teacher="teacher")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("selection", [Selection(), Selection(inputs=True)], ids=["output", "both"])
def test_capturing_changes_no_bit_of_the_logits(
    trace: Trace, read: Any, model_folder: ModelFolder, dtype: str, selection: Selection
) -> None:
    summary = capture(trace, model_folder("llama"), "run", dtype=dtype, selection=selection)
    effect = {"checked": True, "identical": True, "max_abs_difference": 0.0}
    assert summary.observer == effect
    assert trace.manifest("run").provenance["observer_effect"] == effect
    model = load_model(ModelSource(model_folder("llama"), seed=1), getattr(torch, dtype))
    for prompt, tensor in zip(PROMPTS, read(trace, "module = '' AND slot = 'logits'"), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt.token_ids])).logits
        assert tensor.values.tobytes() == logits.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "generation", [Generation(new_tokens=3), Generation(new_tokens=2, batch_size=2)], ids=["single", "batch"]
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_the_plan_counts_what_the_capture_stores(
    trace: Trace, model_folder: ModelFolder, architecture: str, generation: Generation
) -> None:
    summary = capture(trace, model_folder(architecture), "run", generation=generation)
    assert summary.plan is not None, trace.manifest("run").provenance["plan"]
    assert (summary.plan.n_tensors, summary.plan.nbytes) == (summary.n_tensors, summary.nbytes)
    assert summary.stored_nbytes <= summary.plan.stored_nbytes <= summary.nbytes
    assert summary.plan.flops > 0
    assert trace.query("SELECT count(*) FROM tensors").column(0).to_pylist() == [summary.n_tensors]
    assert verify(trace).problems == ()


@pytest.mark.parametrize(
    "selection",
    [
        Selection(include=("*mlp*",), layers=frozenset({1})),
        Selection(positions=range(2, 5)),
        Selection(positions=range(4, 60), layers=frozenset({0})),
        Selection(inputs=True, exclude=("lm_head",)),
    ],
    ids=["include", "positions", "late positions", "inputs"],
)
def test_the_plan_follows_the_selection(trace: Trace, model_folder: ModelFolder, selection: Selection) -> None:
    summary = capture(
        trace,
        model_folder("llama"),
        "run",
        dtype="bf16",
        selection=selection,
        generation=Generation(new_tokens=3, batch_size=3),
    )
    assert summary.plan is not None, trace.manifest("run").provenance["plan"]
    (masks,) = trace.query(
        "SELECT count(*) AS n, coalesce(sum(nbytes), 0)::BIGINT AS nbytes FROM tensors WHERE slot = 'attention_mask'"
    ).to_pylist()
    assert summary.plan.n_tensors == summary.n_tensors - masks["n"]
    assert summary.plan.nbytes == summary.nbytes - masks["nbytes"]


def test_a_model_whose_routing_depends_on_values_says_why_it_has_no_plan_and_is_captured(
    trace: Trace, model_folder: ModelFolder
) -> None:
    summary = capture(trace, model_folder("mixtral"), "run", generation=Generation(new_tokens=2))
    assert summary.n_tensors > 100
    if summary.plan is None:
        assert trace.manifest("run").provenance["plan"]["error"]
    else:
        assert summary.plan.n_tensors == summary.n_tensors
    routers = trace.query(
        "SELECT DISTINCT dims FROM tensors WHERE module LIKE '%.gate' AND phase = 'prefill' AND port = 'output'"
    )
    assert routers.column("dims").to_pylist() == ["(b s) e"]
    assert verify(trace).problems == ()


def test_a_model_that_cannot_be_built_without_its_weights_is_captured_all_the_same(
    trace: Trace, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(ModelSource(model_folder("llama"), seed=0), torch.float32).save_pretrained(tmp_path / "weights")

    def without_bias(config: Any, *_: Any) -> torch.nn.Module:
        raise AttributeError(f"{config.model_type} has no bias")

    monkeypatch.setattr("tensorsleuth.capture.hf._random_model", without_bias)
    prompts = [PromptInput("a", token_ids=(5, 6, 7))]
    summary = capture_hugging_face(
        trace, HuggingFaceCapture(ModelSource(tmp_path / "weights"), "run", "reference", prompts=prompts)
    )
    assert summary.plan is None
    assert trace.manifest("run").provenance["plan"] == {"error": "AttributeError: llama has no bias"}


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_weights_are_drawn_once_and_cast(
    model_folder: ModelFolder, architecture: str, dtype: torch.dtype
) -> None:
    source = ModelSource(model_folder(architecture), seed=3)
    full, cast = load_model(source, torch.float32), load_model(source, dtype)
    assert not cast.training
    weights = dict(cast.named_parameters())
    for name, parameter in full.named_parameters():
        assert weights[name].dtype is dtype
        assert torch.equal(weights[name], parameter.to(dtype)), name
    buffers = dict(cast.named_buffers())
    for name, buffer in full.named_buffers():
        assert torch.equal(buffers[name], buffer.to(buffers[name].dtype)), name
    if architecture == "llama":
        assert buffers["model.rotary_emb.inv_freq"].dtype is torch.float32
    again = load_model(source, dtype)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in again.named_parameters())
    different = load_model(ModelSource(source.path, seed=4), dtype)
    assert not torch.equal(different.get_input_embeddings().weight, cast.get_input_embeddings().weight)


def test_padding_goes_to_one_side_and_gets_position_zero() -> None:
    prompts = [EncodedPrompt("a", None, (5, 6)), EncodedPrompt("b", None, (7, 8, 9))]
    ids, mask = padded(prompts, Generation(padding="left", pad_token=1))
    assert ids.tolist() == [[1, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert positions_of(mask, 3).tolist() == [[0, 0, 1], [0, 1, 2]]
    ids, mask = padded(prompts, Generation(padding="right", pad_token=1))
    assert ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    decode = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    assert positions_of(decode, 1).tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "there is no prompt"),
        ((PromptInput("x", token_ids=()),), "prompt 'x' has no tokens"),
        ((PromptInput("x", token_ids=(64,)),), r"token id 64, the model knows 0..63"),
        ((PromptInput("x", text="hello"),), "no tokenizer"),
        ((PromptInput("x", token_ids=(1,) * 65),), "needs 65 positions .* the model has 64"),
    ],
)
def test_prompts_that_cannot_run_are_refused_before_anything_is_written(
    trace: Trace, model_folder: ModelFolder, prompts: tuple[PromptInput, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        capture(trace, model_folder("llama"), "run", prompts=prompts)
    assert trace.run_names() == []
