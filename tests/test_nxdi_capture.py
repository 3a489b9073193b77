"""Capturing the real NxD Inference on a CPU: parity with transformers, ranks, failures, the library's own capture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.verdict import Thresholds
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.nxdi.run import NxdiCapture, capture_on_cpu
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.cli.app import main
from tensorsleuth.store import InputError, Trace, verify
from tensorsleuth.store.dims import by_position, parse_dims
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3MoeConfig

pytestmark = pytest.mark.skipif(
    not (os.environ.get("NXDI_SRC") and os.environ.get("NXD_SRC")),
    reason="needs the NxD Inference sources: set NXDI_SRC and NXD_SRC to checkouts of them",
)
LLAMA = "neuronx_distributed_inference.models.llama.modeling_llama:NeuronLlamaForCausalLM"
MISTRAL = "neuronx_distributed_inference.models.mistral.modeling_mistral:NeuronMistralForCausalLM"
QWEN3_MOE = "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe:NeuronQwen3MoeForCausalLM"
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PROMPTS = [PromptInput("a", token_ids=tuple(range(2, 9))), PromptInput("b", token_ids=tuple(range(30, 41)))]
PROMPTS.append(PromptInput("c", token_ids=(50, 51, 52)))

Values = dict[tuple[str, str, str], dict[tuple[int, int], npt.NDArray[Any]]]


def save_checkpoint(config: PretrainedConfig, folder: Path) -> Path:
    """A random model whose norms are not 1 and whose biases are not 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            centre, width = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if name.endswith("bias") else 0.1)
            parameter.copy_(centre + width * noise)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**_SIZES, attention_bias=True)
    return save_checkpoint(config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Trace:
    """A trace with an FP32 reference of transformers."""
    trace = Trace.create(tmp_path_factory.mktemp("trace") / "t")
    source = ModelSource(llama)
    generation = Generation(new_tokens=5, batch_size=2)
    capture_hugging_face(trace, HuggingFaceCapture(source, "ref", "reference", prompts=PROMPTS, generation=generation))
    return trace


def capture(trace: Trace, model: Path, run: str, port: str = LLAMA, **options: Any) -> str:
    request = {"dtype": "float32", "teacher": "ref", "generation": Generation(batch_size=2), **options}
    summary = capture_on_cpu(trace, NxdiCapture(model, port, run, "target", **request))
    assert summary.observer["identical"]
    return run


def values(trace: Trace, run: str) -> Values:
    """Global values by site, prompt and position: ranks joined as their dims say."""
    rows = trace.query(
        "SELECT t.*, s.path FROM tensors t JOIN shards s USING (run, rank, shard) "
        "WHERE run = ? AND phase <> 'static' AND position_start IS NOT NULL ORDER BY prompt, step, call, rank",
        [run],
    ).to_pylist()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("module", "port", "slot", "prompt", "step", "call"))
        groups.setdefault(key, []).append(row)
    found: Values = {}
    for (module, port, slot, prompt, *_), ranks in groups.items():
        joined = by_position(_join(trace, ranks), ranks[0]["dims"])
        for offset, vector in enumerate(joined):
            place = (prompt, ranks[0]["position_start"] + offset)
            found.setdefault((module, port, slot), {}).setdefault(place, vector)
    return found


def _join(trace: Trace, ranks: list[dict[str, Any]]) -> npt.NDArray[Any]:
    columns = ("path", "dtype", "shape", "file_offset", "nbytes")
    parts = [trace.values(*(row[c] for c in columns)).astype(np.float64) for row in ranks]
    axes = parse_dims(ranks[0]["dims"]).axes
    if any(axis.partial for axis in axes):
        return sum(parts[1:], parts[0])
    for index, axis in enumerate(axes):
        if axis.sharded:
            for first in range(0, len(parts), axis.copies):
                for copy in parts[first : first + axis.copies]:
                    np.testing.assert_array_equal(copy, parts[first])
            return np.concatenate(parts[:: axis.copies], axis=index)
    for part in parts[1:]:
        np.testing.assert_array_equal(part, parts[0], err_msg=str(ranks[0]["module"]))
    return parts[0]


#: NxD Inference site by transformers module: what corresponds in a llama.
def llama_pairs() -> Iterator[tuple[tuple[str, str, str], tuple[str, str, str]]]:
    yield ("embed_tokens", "output", ""), ("model.embed_tokens", "output", "")
    for layer in range(2):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn"):
            yield (f"{ours}.{name}", "output", ""), (f"{theirs}.{name}", "output", "")
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            yield (f"{ours}.self_attn.qkv_proj", "output", str(index)), (f"{theirs}.self_attn.{name}", "output", "")
        yield (f"{ours}.self_attn", "output", "hidden_states"), (f"{theirs}.self_attn", "output", "0")
        yield (f"{ours}.self_attn.o_proj", "output", ""), (f"{theirs}.self_attn.o_proj", "output", "")
        yield (f"{ours}.mlp", "output", "0"), (f"{theirs}.mlp", "output", "")
        yield (ours, "output", "0"), (theirs, "output", "")
    yield ("layers.0.self_attn.rotary_emb", "output", "0"), ("model.rotary_emb", "output", "0")
    yield ("norm", "output", ""), ("model.norm", "output", "")
    yield ("lm_head", "output", ""), ("lm_head", "output", "")
    yield ("", "output", "0"), ("", "output", "logits")


def relative_l2(ours: dict[Any, Any], theirs: dict[Any, Any]) -> float:
    places = sorted(set(ours) & set(theirs))
    assert places
    a, b = (np.concatenate([side[place].ravel() for place in places]) for side in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tp1", {"tp": 1}),
        ("tp2", {"tp": 2}),
        ("tp4", {"tp": 4}),
        ("sequence-parallel", {"tp": 2, "options": {"sequence_parallel_enabled": True}}),
    ],
)
def test_fp32_agrees_with_transformers_at_every_mapped_site(
    recorded: Trace, llama: Path, name: str, options: dict[str, Any]
) -> None:
    reference, target = values(recorded, "ref"), values(recorded, capture(recorded, llama, name, **options))
    n_positions = sum(len(prompt.token_ids or ()) + 4 for prompt in PROMPTS)
    for ours, theirs in llama_pairs():
        if ours[0] not in ("", "lm_head"):
            assert len(target[ours]) == n_positions, ours
        assert relative_l2(target[ours], reference[theirs]) < 1e-5, ours


def test_fused_projections_are_recorded_whole_and_split(tmp_path: Path) -> None:
    model = save_checkpoint(LlamaConfig(**_SIZES), tmp_path / "model")
    trace = Trace.create(tmp_path / "t")
    source = ModelSource(model)
    capture_hugging_face(trace, HuggingFaceCapture(source, "ref", "reference", prompts=PROMPTS))
    reference = values(trace, "ref")
    target = values(trace, capture(trace, model, "fused", tp=2, options={"fused_qkv": True}))
    for ours, theirs in llama_pairs():
        assert relative_l2(target[ours], reference[theirs]) < 1e-5, ours
    assert ("layers.0.self_attn.qkv_proj.Wqkv", "output", "") in target


def test_bf16_on_two_ranks_stays_close_and_is_stored_as_bf16(recorded: Trace, llama: Path) -> None:
    capture(recorded, llama, "bf16", dtype="bfloat16", tp=2)
    reference, target = values(recorded, "ref"), values(recorded, "bf16")
    assert relative_l2(target["norm", "output", ""], reference["model.norm", "output", ""]) < 0.05
    manifest = recorded.manifest("bf16")
    assert (manifest.dtype, manifest.tp, manifest.stack, manifest.status) == ("bfloat16", 2, "nxdi-cpu", "complete")
    assert manifest.tokens[1].token_ids == recorded.manifest("ref").tokens[1].token_ids


def test_caches_hold_the_keys_after_the_rotary_embedding(recorded: Trace, llama: Path) -> None:
    site = values(recorded, capture(recorded, llama, "taps", tp=2, scores=True))
    for layer in range(2):
        path = f"layers.{layer}.self_attn"
        cache, keys = site[path, "tap", "k_cache"], site[path, "tap", "k_rope"]
        assert cache.keys() == keys.keys() == site[path, "tap", "q_rope"].keys() == site[path, "tap", "v_cache"].keys()
        assert all(np.array_equal(cache[place], keys[place]) for place in cache)
    rows = recorded.query("SELECT DISTINCT dims, shape FROM tensors WHERE run = 'taps' AND slot = 'scores'").to_pylist()
    assert {row["dims"] for row in rows} == {"b n[tp] s k"}
    assert sorted(row["shape"][2:] for row in rows) == [[3, 3], [7, 7], [11, 11]]


def test_the_librarys_own_capture_agrees_bit_for_bit(recorded: Trace, llama: Path) -> None:
    capture(recorded, llama, "hooks", tp=1, dtype="bfloat16")
    capture(recorded, llama, "library", tp=1, dtype="bfloat16", library_capture=True)
    ours, theirs = values(recorded, "hooks"), values(recorded, "library")
    assert len(theirs) > 20
    assert not recorded.manifest("library").provenance["skipped"]
    for (module, port, slot), tensors in theirs.items():
        counterpart = ours.get((module, port, slot)) or ours[module, port, "0"]
        assert tensors.keys() == counterpart.keys(), module
        assert all(np.array_equal(tensors[place], counterpart[place]) for place in tensors), module
    assert any("self_attn: replaced by" in note for note in recorded.manifest("library").provenance["notes"])


#: Compile passes as a device runs them, but for the device: the library's own capture on a CPU, a folder a pass.
PASSES = """
import dataclasses, json, sys
from contextlib import ExitStack
from pathlib import Path
import torch
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.nxdi.application import CpuSettings, build_application, build_config
from tensorsleuth.capture.nxdi.captured import library_capture
from tensorsleuth.capture.nxdi.device_plan import ON_DEVICE_SAMPLING, plan_device_capture
from tensorsleuth.capture.nxdi.device_run import CompiledPasses, dims_by_name
from tensorsleuth.capture.nxdi.passes import record_passes
from tensorsleuth.capture.nxdi.port import activate, load_class, parse_class
from tensorsleuth.capture.nxdi.rank_process import join_alone
from tensorsleuth.capture.prompts import EncodedPrompt
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import Trace
from tensorsleuth.store.run_writer import RunWriter

trace, path, budget = Trace.open(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
activate()
join_alone()
port = load_class(parse_class(sys.argv[3]))
settings = CpuSettings(torch.bfloat16, 1, 2, 64, ON_DEVICE_SAMPLING)
application = build_application(port, build_config(port, port.get_config_cls(), path, settings), path, 0, 1)
model = application.models[0].model
plan = plan_device_capture({n: type(m).__name__ for n, m in model.named_modules()}, Selection(), budget=budget)
stack = ExitStack()

class Compiled:
    def __init__(self, folder):
        self._number = int(Path(folder).name)

    def load(self, folder):
        stack.close()
        stack.enter_context(library_capture(model, plan.passes[self._number]))
        self.neuron_config = model.neuron_config

    def __call__(self, *arguments, **options):
        return application(*arguments, **options)

    def reset(self):
        application.reset()

folders = [Path(str(number)) for number in range(len(plan.passes))]
loaded = CompiledPasses(Compiled, folders, 0)
like = trace.manifest("hooks")
lengths = {p.prompt: p.n_tokens for p in like.prompts}
prompts = [EncodedPrompt(str(t.prompt), None, t.token_ids[:lengths[t.prompt]], t.token_ids[lengths[t.prompt]:])
           for t in like.tokens]
manifest = trace.begin_run(dataclasses.replace(like, run="joined", ordinal=0, tokens=(), status="running"))
tokens = []
writer = RunWriter(trace.run_folder("joined"), "joined", manifest=manifest.to_json)
with torch.no_grad():
    facts = record_passes(loaded, prompts, Generation(padding="right", batch_size=2), writer, dims_by_name(1),
                          tokens=tokens)
writer.close()
trace.finish_run(dataclasses.replace(manifest, status="complete", tokens=tuple(tokens), provenance=facts))
print(json.dumps([len(plan.passes), loaded.modules]))
"""


def test_several_compile_passes_join_into_one_run_with_the_coverage_of_all(recorded: Trace, llama: Path) -> None:
    for run, options in (("hooks", {}), ("library", {"library_capture": True})):
        if run not in recorded.run_names():
            capture(recorded, llama, run, tp=1, dtype="bfloat16", **options)
    command = [sys.executable, "-c", PASSES, str(recorded.path), str(llama), LLAMA, "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_passes, modules = json.loads(done.stdout.strip().splitlines()[-1])
    facts = recorded.manifest("joined").provenance
    assert n_passes == len(facts["passes"]) > 3
    assert all(part["logits"]["identical"] for part in facts["passes"])
    joined, whole = values(recorded, "joined"), values(recorded, "library")
    assert {site[0] for site in joined} == {site[0] for site in whole} == set(modules)
    for site, tensors in joined.items():
        assert tensors.keys() == whole[site].keys(), site
        assert all(np.array_equal(tensors[place], whole[site][place]) for place in tensors), site
    orders = recorded.query(
        "SELECT module, count(DISTINCT exec_order) AS n FROM tensors WHERE run = 'joined' GROUP BY module"
    ).to_pylist()
    assert {row["n"] for row in orders} == {1}
    assert verify(recorded).problems == ()


def test_experts_are_summed_over_ranks_and_the_router_is_kept(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **_SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    model = save_checkpoint(config, tmp_path / "model")
    trace = Trace.create(tmp_path / "t")
    generation = Generation(new_tokens=3)
    capture_hugging_face(
        trace, HuggingFaceCapture(ModelSource(model), "ref", "reference", prompts=PROMPTS[:2], generation=generation)
    )
    reference = values(trace, "ref")
    target = values(trace, capture(trace, model, "tp2", QWEN3_MOE, tp=2))
    theirs = reference["model.layers.0.mlp", "output", "0"]
    assert relative_l2(target["layers.0.mlp", "output", "0"], theirs) < 1e-5
    assert relative_l2(target["layers.0.mlp.expert_mlps", "output", ""], theirs) < 1e-5
    router = reference["model.layers.0.mlp.gate", "output", ""]
    assert relative_l2(target["layers.0.mlp.router", "output", "0"], router) < 1e-5
    chosen = target["layers.0.mlp.router", "output", "2"]
    assert all(set(chosen[place].astype(int)) == set(np.argsort(router[place])[-2:]) for place in chosen)


def test_weights_that_do_not_fit_are_listed(recorded: Trace, llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((llama / "config.json").read_bytes())
    weights = load_file(llama / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.gate_porj.weight"] = torch.ones(2, 2)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(norm\.weight\); 1 unexpected \(layers\.0\.mlp\.gate_porj"):
        capture(recorded, model, "unfit")
    assert "unfit" not in recorded.run_names()


@pytest.mark.parametrize("degree", ["ep_degree", "moe_ep_degree", "cp_degree", "pp_degree"])
def test_parallelism_other_than_over_tensors_is_refused(recorded: Trace, llama: Path, degree: str) -> None:
    with pytest.raises(InputError, match=f"--neuron {degree}=2 spreads the model"):
        capture(recorded, llama, "spread", tp=2, options={degree: 2})
    assert "spread" not in recorded.run_names()


def test_a_sliding_window_shorter_than_the_prompt_is_right(tmp_path: Path) -> None:
    config = MistralConfig(**_SIZES, sliding_window=8, head_dim=16)
    model = save_checkpoint(config, tmp_path / "model")
    trace = Trace.create(tmp_path / "t")
    prompts = [PromptInput("a", token_ids=tuple((7 * i) % 90 + 2 for i in range(30)))]
    generation = Generation(new_tokens=6)
    request = HuggingFaceCapture(ModelSource(model), "ref", "reference", prompts=prompts, generation=generation)
    capture_hugging_face(trace, request)
    reference, target = values(trace, "ref"), values(trace, capture(trace, model, "window", MISTRAL))
    for ours, theirs in llama_pairs():
        assert relative_l2(target[ours], reference[theirs]) < 1e-5, ours


@pytest.mark.parametrize(("kind", "port", "tp"), [(LlamaConfig, LLAMA, 2), (MistralConfig, MISTRAL, 1)])
def test_attention_weights_are_those_of_eager_attention(kind: Any, port: str, tp: int, tmp_path: Path) -> None:
    window = {"sliding_window": 8, "head_dim": 16} if kind is MistralConfig else {}
    model = save_checkpoint(kind(**_SIZES, **window), tmp_path / "model")
    trace = Trace.create(tmp_path / "t")
    prompts = [
        PromptInput(name, token_ids=tuple((7 * i) % 90 + 2 for i in range(n))) for name, n in (("a", 12), ("b", 5))
    ]
    generation = Generation(new_tokens=6, batch_size=1 if window else 2)
    source = ModelSource(model, attention="eager")
    capture_hugging_face(trace, HuggingFaceCapture(source, "ref", "reference", prompts=prompts, generation=generation))
    batches = Generation(batch_size=generation.batch_size)
    capture(trace, model, "weights", port, tp=tp, scores=True, generation=batches)
    reference, target = values(trace, "ref"), values(trace, "weights")
    for layer in range(2):
        ours = target[f"layers.{layer}.self_attn", "tap", "weights"]
        theirs = reference[f"model.layers.{layer}.self_attn", "output", "1"]
        assert ours.keys() == theirs.keys()
        for place in theirs:
            np.testing.assert_allclose(ours[place], theirs[place], atol=2e-6)
    assert (
        compare(trace, ComparisonRequest("ref", "weights", thresholds=Thresholds(relative_l2=1e-5))).verdict == "pass"
    )


PORT_FILE = """
from neuronx_distributed_inference.models.llama.modeling_llama import LlamaInferenceConfig, NeuronLlamaForCausalLM


class OwnConfig(LlamaInferenceConfig):
    pass


class OwnLlama(NeuronLlamaForCausalLM):
    @classmethod
    def get_config_cls(cls):
        return OwnConfig
"""


def test_the_plan_of_a_users_own_port_is_what_its_capture_records(
    recorded: Trace, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_port.py").write_text(PORT_FILE)
    arguments = [
        "capture",
        "nxdi",
        str(recorded.path),
        str(llama),
        "--run",
        "own",
        "--cpu",
        "--tp",
        "2",
        "--batch",
        "2",
    ]
    arguments += ["--port", f"{tmp_path}/own_port.py:OwnLlama", "--config", f"{tmp_path}/own_port.py:OwnConfig"]
    arguments += ["--dtype", "float32", "--teacher", "ref", "--json"]
    assert main([*arguments, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "own" not in recorded.run_names()
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (plan["n_tensors"], plan["nbytes"]) == (found["n_tensors"], found["nbytes"])
    assert plan["stored_nbytes"] >= found["stored_nbytes"]
    assert recorded.manifest("own").modules[0].cls == "NeuronLlamaModel"


def test_a_killed_rank_stops_the_others_and_keeps_what_was_recorded(llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [5, 6, 7]}\n')
    arguments = ["capture", "nxdi", str(tmp_path / "t"), str(llama), "--run", "a", "--port", LLAMA, "--cpu"]
    arguments += ["--tp", "2", "--dtype", "float32", "--prompts", str(prompts), "--generate", "240"]
    process = subprocess.Popen([sys.executable, "-m", "tensorsleuth", *arguments], stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "t" / "runs" / "a"
    deadline = time.monotonic() + 120
    while not all((folder / f"rank{rank}-0.journal").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    pids = [int((folder / f"rank{rank}.lock").read_text()) for rank in (0, 1)]
    time.sleep(0.5)
    os.kill(pids[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.strip().splitlines()[-1].startswith("sleuth: rank 1 of 2 failed: killed by signal 9")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    trace = Trace.open(tmp_path / "t")
    assert trace.manifest("a").status == "failed"
    counts = trace.query("SELECT rank, count(*) AS n FROM tensors GROUP BY rank ORDER BY rank").to_pylist()
    assert [row["rank"] for row in counts] == [0, 1]
    assert verify(trace).problems == ()
