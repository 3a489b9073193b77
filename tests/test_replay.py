"""Replay: every module on the target's own values. A planted fault shows where it is, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.localization.localize import localize
from tensorsleuth.analyze.sites import sites_of
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import HuggingFaceCausalModel, ModelSource, load_model
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face, run_recorded
from tensorsleuth.capture.prompts import PromptInput, read_prompts, teacher_prompts
from tensorsleuth.capture.replay import ReplayRequest, ReplaySummary, replay, replayed_sites
from tensorsleuth.capture.replay.origins import Origin, OriginTracker
from tensorsleuth.capture.replay.reductions import rounded_like
from tensorsleuth.capture.replay.self_check import check_reference, find_model
from tensorsleuth.capture.selection import Selection
from tensorsleuth.capture.slots import tensor_slots, with_tensors
from tensorsleuth.cli.app import main
from tensorsleuth.examples.faults import FAULTS
from tensorsleuth.examples.walkthrough import MODEL, capture_target, compare_target
from tensorsleuth.store import InputError, Trace
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
MIXTRAL_GATE = f"model.layers.1.{'mlp' if int(transformers.__version__[0]) >= 5 else 'block_sparse_moe'}.gate"
PROMPTS = [PromptInput(str(n), token_ids=tuple((7 * i * i + 3 * n) % 96 for i in range(16 + n))) for n in range(2)]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Model folder, and a trace with its FP32 reference and BF16 baseline, by architecture."""
    parent = tmp_path_factory.mktemp("references")

    def found(name: str) -> tuple[Path, Path]:
        folder, trace = parent / name, parent / f"{name}-trace"
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_MODELS[name]()).float()
            with torch.no_grad():
                for weight_name, weight in model.named_parameters():
                    centre, width = (1.0, 0.3) if "norm" in weight_name else (0.0, 0.1)
                    weight.copy_(centre + width * torch.randn(weight.shape))
            model.save_pretrained(folder)
            opened, source = Trace.create(trace), ModelSource(folder)
            wanted = HuggingFaceCapture(source, "fp32", "reference", prompts=PROMPTS, generation=Generation(3))
            capture_hugging_face(opened, wanted)
            capture_hugging_face(opened, HuggingFaceCapture(source, "bf16", "baseline", "bfloat16", teacher="fp32"))
        return folder, trace

    return found


@pytest.fixture
def scene(references: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Callable[..., tuple[Trace, ReplaySummary]]:
    """Captures a model with one module patched, compares it and replays the comparison."""

    def played(
        name: str, patched: str | None, *, selection: Selection | None = None, **request: Any
    ) -> tuple[Trace, ReplaySummary]:
        folder, stored = references(name)
        trace = Trace.open(shutil.copytree(stored, tmp_path / f"{name}-{patched}"))
        capture_patched(trace, folder, patched, selection or Selection())
        compare(trace, ComparisonRequest("fp32", "port", "bf16"))
        return trace, replay(trace, ReplayRequest("port", **request))

    return played


def capture_patched(trace: Trace, folder: Path, patched: str | None, selection: Selection) -> None:
    """The BF16 model as target, with the output of one module 5 % too large."""
    model = load_model(ModelSource(folder), torch.bfloat16)
    if patched:
        module = dict(model.named_modules())[patched]
        forward = module.forward

        def too_large(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            return (output[0] * 1.05, *output[1:]) if isinstance(output, tuple) else output * 1.05

        module.forward = too_large
    run_recorded(
        trace,
        model,
        HuggingFaceCausalModel(model),
        teacher_prompts(trace.manifest("fp32")),
        Generation(),
        run="port",
        role="target",
        stack="hf",
        model_name=name_of(patched),
        selection=selection,
        facts={},
    )


def name_of(patched: str | None) -> str:
    return f"patched at {patched}" if patched else "clean"


def local(trace: Trace, summary: ReplaySummary) -> dict[tuple[str, str], float]:
    """R_local by module and phase, the largest of its sites; measured ones only."""
    found: dict[tuple[str, str], float] = {}
    for row in replayed_sites(trace, summary):
        if row["state"] == "measured":
            key = row["module"], row["phase"]
            found[key] = max(found.get(key, 0.0), row["r_local"])
    return found


def check_found(trace: Trace, summary: ReplaySummary, patched: str) -> None:
    """The patched module and those around it fail, in both phases; all others are near one."""
    assert summary.verdict == "fail"
    assert [found.module for found in summary.injecting] == [patched]
    for (module, phase), r in local(trace, summary).items():
        if module == patched:
            assert r > 1.5, (module, phase, r)
        elif not patched.startswith(f"{module}."):
            assert 0.8 < r < 1.2, (module, phase, r)


def test_a_clean_target_adds_nothing_anywhere(scene: Callable[..., tuple[Trace, ReplaySummary]]) -> None:
    trace, summary = scene("llama", None)
    assert (summary.verdict, summary.reasons, summary.injecting) == ("pass", (), ())
    assert summary.self_check == {"n_sites": 31, "identical": True, "max_relative_l2": 0.0}
    found = local(trace, summary)
    assert {phase for _, phase in found} == {"prefill", "decode"}
    assert len(found) == 2 * 30  # 13 modules in each of two layers, embedding, rotary embedding, norm, head
    assert all(0.9 < r < 1.1 for r in found.values())
    assert {item.site: item.status for item in summary.left_out} == {
        "model[last_hidden_state]": "skipped",
        "(root)[logits]": "skipped",
    }
    check_runs(trace, summary)
    again = replay(trace, ReplayRequest("port", modules=("model.norm",)))
    assert (again.verdict, again.n_replayed) == ("pass", 1)


def check_runs(trace: Trace, summary: ReplaySummary) -> None:
    """Replays are runs with the target's tokens, in the target's steps."""
    target = trace.manifest("port")
    for run, role, dtype in ((summary.reference, "reference", "float32"), (summary.baseline, "baseline", "bfloat16")):
        assert run is not None
        manifest = trace.manifest(run)
        assert (manifest.role, manifest.dtype, manifest.status) == (role, dtype, "complete")
        assert manifest.provenance["replay_of"] == "port"
        assert manifest.provenance["replay_inputs_of"] == "port"
        assert manifest.tokens == target.tokens
    steps = (
        "SELECT DISTINCT prompt, phase, step, position_start, position_count FROM tensors WHERE run = ? AND module = ?"
    )
    one, other = (
        sorted(map(str, trace.query(steps, [run, "model.layers.1.mlp"]).to_pylist()))
        for run in (summary.reference, "port")
    )
    assert one == other


@pytest.mark.parametrize(
    ("name", "patched", "inputs"),
    [
        ("llama", "model.layers.1.self_attn", True),
        ("qwen3", "model.layers.0.self_attn.q_norm", False),
        ("mixtral", MIXTRAL_GATE, False),
        ("gpt_oss", "model.layers.0.mlp.experts", True),
    ],
)
def test_a_patched_module_is_the_only_one_that_adds_error(
    scene: Callable[..., tuple[Trace, ReplaySummary]], name: str, patched: str, inputs: bool
) -> None:
    around = () if name == "llama" else (f"{patched[:14]}*",)  # the layer that it is in
    trace, summary = scene(name, patched, selection=Selection(inputs=inputs), modules=around)
    check_found(trace, summary, patched)
    if name == "llama":  # in place, everything behind it looks wrong too
        behind = trace.query("SELECT site FROM measurements WHERE comparison = 'port' AND verdict = 'fail'")
        alone = trace.query("SELECT site FROM measurements WHERE comparison = 'port.replay' AND verdict = 'fail'")
        assert behind.num_rows > 2 * alone.num_rows
    assert summary.inputs[patched].text.startswith("captured") == inputs
    assert not summary.injecting[0].code


def test_a_planted_bug_of_a_port_shows_where_it_is(stand_ins: Path, tmp_path: Path) -> None:
    fault = "decode-mask"
    trace = Trace.open(shutil.copytree(stand_ins, tmp_path / "trace"))
    capture_target(trace, fault=fault)
    compare_target(trace)
    summary = replay(trace, ReplayRequest("target", tp=2))
    planted, found = FAULTS[fault], summary.injecting
    assert {fnmatchcase(item.target_site.partition("[")[0], planted.site.replace("0", "*")) for item in found} == {True}
    assert {item.phases for item in found} == {(planted.phase,)}
    others = [r for (_, phase), r in local(trace, summary).items() if phase == "prefill"]
    assert 0.8 < min(others) < max(others) < 1.2
    assert all(item.code for item in found)  # the port's inputs were not captured: the code before it is a suspect too
    first = localize(trace, "target").suspects[0]  # knows of the replay
    assert (first.module, first.phase) == (found[0].module, planted.phase)
    worst = local(trace, summary)[first.module, first.phase]
    assert first.injected == pytest.approx(worst)
    assert "on the target's own inputs" in first.reason


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace with the FP32 reference and the BF16 baseline of the demo's model."""
    path = tmp_path_factory.mktemp("stand-in") / "trace"
    trace, source = Trace.create(path), ModelSource(MODEL)
    prompts = read_prompts(MODEL / "prompts.jsonl")[:2]
    wanted = HuggingFaceCapture(source, "fp32", "reference", prompts=prompts, generation=Generation(4))
    capture_hugging_face(trace, wanted)
    capture_hugging_face(trace, HuggingFaceCapture(source, "bf16", "baseline", "bfloat16", teacher="fp32"))
    return path


def test_the_reference_on_its_own_inputs_is_itself_bit_for_bit_in_batches_too(tmp_path: Path) -> None:
    """The self-check itself: padded rows of different lengths, inputs and outputs put in place from the trace."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_MODELS["llama"]()).save_pretrained(tmp_path / "model")
    source, trace = ModelSource(tmp_path / "model"), Trace.create(tmp_path / "trace")
    generation = Generation(2, batch_size=2)
    everything = Selection(inputs=True)
    request = HuggingFaceCapture(
        source, "fp32", "reference", prompts=PROMPTS, generation=generation, selection=everything
    )
    capture_hugging_face(trace, request)
    found = check_reference(trace, trace.manifest("fp32"), sites_of(trace, "fp32"), source)
    assert found == {"n_sites": 31, "identical": True, "max_relative_l2": 0.0}


def test_another_checkpoint_is_refused_by_its_fingerprint_and_by_its_values(
    references: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, stored = references("llama")
    trace = Trace.open(shutil.copytree(stored, tmp_path / "trace"))
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    manifest, sites = trace.manifest("fp32"), sites_of(trace, "fp32")
    with pytest.raises(InputError, match="is not the checkpoint that run 'fp32' was captured from"):
        find_model(manifest, other)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp.* is .* away .*\(the weights differ\)"):
        check_reference(trace, manifest, sites, ModelSource(other))
    with pytest.raises(InputError, match="is not at /nowhere any more; name it with --model"):
        find_model(replace(manifest, model="/nowhere"), None)
    with pytest.raises(InputError, match="its stack is nxdi"):
        find_model(replace(manifest, stack="nxdi"), None)


def test_modules_behind_something_unrecorded_are_holes_with_a_reason(
    references: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The target kept layer 1 only: what enters it is not known, what happens inside is."""
    folder, stored = references("llama")
    trace = Trace.open(shutil.copytree(stored, tmp_path / "trace"))
    capture_patched(trace, folder, None, Selection(include=("model.layers.1*",), exclude=("*.act_fn",)))
    compare(trace, ComparisonRequest("fp32", "port", "bf16", include=("model.layers.1*",)))
    summary = replay(trace, ReplayRequest("port"))
    assert summary.verdict == "undecided"
    reasons = {item.site: (item.status, item.reason) for item in summary.left_out}
    assert reasons["model.layers.1.input_layernorm"][0] == "unmatched"
    assert "model.embed_tokens" in reasons["model.layers.1.input_layernorm"][1]
    assert reasons["model.layers.0.mlp"][0] == "skipped"
    assert "through the reference's model.layers.1.mlp.act_fn" in summary.inputs["model.layers.1.mlp.down_proj"].text
    rows = trace.query("SELECT site, status FROM coverage WHERE comparison = 'port.replay'").to_pylist()
    assert {row["site"] for row in rows if row["status"] == "unmatched"} >= {"model.layers.1.input_layernorm"}
    counts = trace.query("SELECT verdict, n_unmatched FROM comparisons WHERE comparison = 'port.replay'").to_pylist()
    assert counts == [{"verdict": "undecided", "n_unmatched": sum(r["status"] == "unmatched" for r in rows)}]


def test_random_inputs_find_what_differs_between_two_checkpoints(
    references: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, stored = references("llama")
    trace = Trace.open(shutil.copytree(stored, tmp_path / "trace"))
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj.weight"] *= 1.05
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    capture_hugging_face(trace, HuggingFaceCapture(ModelSource(other), "port", "target", "bfloat16", teacher="fp32"))
    compare(trace, ComparisonRequest("fp32", "port", "bf16"))
    summary = replay(trace, ReplayRequest("port", modules=("model.layers.0*", "model.norm"), random=3))
    assert summary.comparison == "port.random"
    check_found(trace, summary, "model.layers.0.mlp.gate_proj")
    assert summary.inputs["model.layers.0.mlp.gate_proj"].text == "random values"


def test_the_command_prints_what_injects_and_ends_with_the_verdict(
    references: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, stored = references("llama")
    trace = Trace.open(shutil.copytree(stored, tmp_path / "trace"))
    capture_patched(trace, folder, "model.layers.1.mlp.up_proj", Selection(inputs=True))
    compare(trace, ComparisonRequest("fp32", "port", "bf16"))
    options = [str(trace.path), "port", "--modules", "model.layers.1.mlp*"]
    assert main(["replay", *options]) == 1
    assert "injects: model.layers.1.mlp.up_proj (prefill, decode;" in capsys.readouterr().out
    assert main(["replay", *options, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [found["module"] for found in printed["injecting"]] == ["model.layers.1.mlp.up_proj"]
    assert {row["module"] for row in printed["modules"] if row["verdict"] == "fail"} == {
        "model.layers.1.mlp",
        "model.layers.1.mlp.up_proj",
    }
    assert main(["replay", str(trace.path), "nothing"]) == 2
    assert "its comparisons: port" in capsys.readouterr().err
    assert main(["replay", str(trace.path), "port", "--modules", "decoder*"]) == 2
    assert "no sites" in capsys.readouterr().err


_NESTED = st.recursive(
    st.builds(lambda n: torch.full((2,), float(n)), st.integers(0, 9)) | st.none() | st.integers(),
    lambda inner: st.tuples(inner, inner) | st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=6,
)


@given(_NESTED, st.integers(0, 5))
def test_tensors_are_exchanged_in_the_slots_where_they_were_found(value: Any, pick: int) -> None:
    slots = dict(tensor_slots(value))
    chosen = {slot: torch.ones(3) for index, slot in enumerate(slots) if index == pick}
    changed = with_tensors(value, chosen)
    assert type(changed) is type(value)
    after = dict(tensor_slots(changed))
    assert list(after) == list(slots)
    assert all(after[slot] is chosen.get(slot, slots[slot]) for slot in slots)


def test_origins_follow_views_and_name_the_code_that_computes() -> None:
    tracker = OriginTracker()
    one, other, free = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    with tracker:
        tracker.mark(one, Origin(frozenset({"one"})))
        tracker.mark(other, Origin(frozenset({"other"}), complete=False))
        tracker.running.append("layer")
        viewed = one.view(4, 2).transpose(0, 1)
        total = viewed.reshape(2, 4) + other
        assert tracker.of(viewed) == Origin(frozenset({"one"}))
        assert tracker.of(total) == Origin(frozenset({"one", "other"}), frozenset({"layer"}), complete=False)
        assert tracker.of(free * 2) is None


def test_parallel_projections_round_their_parts_and_then_the_bias() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 64)).bfloat16().requires_grad_(False)
    hidden = torch.randn(32, 512).bfloat16()
    exact = torch.nn.functional.linear(hidden.double(), model[0].weight.double(), model[0].bias.double())
    plain = float((model(hidden).double() - exact).norm())
    with rounded_like(model, {"0": 2}):
        parts = float((model(hidden).double() - exact).norm())
    assert 1.3 < parts / plain < 2.1  # two or three independent roundings instead of one: their variances add
    assert float((model(hidden).double() - exact).norm()) == plain
