"""Compiling, answering and validating: what is said of a port is what happened.

On a machine without the Neuron SDK the device path runs up to the call that needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorsleuth.cli.app import main
from tensorsleuth.porting.environment import find_environment
from tensorsleuth.porting.running.advice import advise
from tensorsleuth.porting.running.coherence import incoherence
from tensorsleuth.porting.running.compiler_flags import apply_flags, environment, set_for_now
from tensorsleuth.porting.running.configuration import CompilationConfig
from tensorsleuth.porting.running.matching import PromptTokenMatch, TokenMatch
from tensorsleuth.porting.running.reduction import reduce_checkpoint
from tensorsleuth.porting.running.restored import lost_on_the_way, read_saved_config
from tensorsleuth.porting.running.sampling import Sampling, answer
from tensorsleuth.porting.running.validation_config import read_validation_config
from tensorsleuth.store.errors import InputError
from transformers import AutoModelForCausalLM, LlamaConfig

needs_sources = pytest.mark.skipif(
    find_environment().nxdi is None or find_environment().nxd is None,
    reason="needs the sources of NxD and NxD Inference: set NXDI_SRC and NXD_SRC",
)
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights in several files and without a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="150KB")
    return folder


def test_a_degree_is_judged_by_vocabulary_heads_and_experts() -> None:
    config = {"vocab_size": 32001, "num_attention_heads": 12, "num_key_value_heads": 3, "num_local_experts": 6}
    assert advise(config, 1) == []
    said = " ".join(advise(config, 8, ep=4))
    for text in ("vocab_size 32001", "12 attention heads", "3 KV heads and tp_degree 8", "the cache grows 4 times"):
        assert text in said
    assert "6 experts" in said
    assert advise({"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}, 8) == [
        "2 KV heads on 8 ranks: each is held by 4 ranks; expected, no error"
    ]
    assert advise({"text_config": {"vocab_size": 9}}, 2)[0].startswith("vocab_size 9")


def test_a_reduced_checkpoint_is_the_first_layers_of_the_full_one(checkpoint: Path, tmp_path: Path) -> None:
    folder = reduce_checkpoint(checkpoint, 2, tmp_path / "reduced")
    full, reduced = (AutoModelForCausalLM.from_pretrained(one) for one in (checkpoint, folder))
    expected = {name: value for name, value in full.state_dict().items() if ".layers.2." not in name}
    assert reduced.config.num_hidden_layers == 2
    assert set(reduced.state_dict()) == set(expected)
    assert all(torch.equal(reduced.state_dict()[name], value) for name, value in expected.items())


def test_lists_with_an_entry_per_layer_are_cut_too(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    body = json.loads((source / "config.json").read_text())
    body["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    (source / "config.json").write_text(json.dumps(body))
    reduced = json.loads((reduce_checkpoint(source, 1, tmp_path / "reduced") / "config.json").read_text())
    assert reduced["layer_types"] == ["sliding_attention"]
    assert reduced["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "empty"),
        ([2], "empty"),
        ([5, 5, 5, 5], "the same token 4 times"),
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], "the last 3 tokens are repeated 4 times"),
        ([4, 7, *[3] * 12], "the last 1 tokens are repeated 12 times"),
        ([9, 9, 44, 44, 44, 44, 44, 44, 44, 2], "the last 1 tokens are repeated 7 times"),
        ([1, 3, 4, 5, 6, 7, 8], ""),
        ([1, 5, 5, 5, 6], ""),
    ],
)
def test_output_that_is_none_is_recognised(tokens: list[int], said: str) -> None:
    why = incoherence(tokens, special=frozenset({2}))
    assert said in why
    assert bool(why) == bool(said)


@given(st.lists(st.integers(3, 400), min_size=1, max_size=40, unique=True))
def test_distinct_tokens_are_never_called_a_loop(tokens: list[int]) -> None:
    assert incoherence(tokens) == ""


class Counter:
    """A model that continues with the next number, and has seen what it was fed."""

    def __init__(self, vocabulary: int = 16) -> None:
        self.vocabulary, self.fed = vocabulary, 0

    def __call__(self, ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        self.fed += ids.shape[1]
        assert positions[0, -1] == self.fed - 1  # one position a token, through prefill and decode
        assert mask.shape[1] == self.fed
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[0, 0, (ids[0, -1] + 1) % self.vocabulary] = 5.0
        return logits, True


def test_greedy_answers_stop_at_a_stop_token_and_count_what_was_suppressed() -> None:
    found = answer(Counter(), [3, 4], Sampling(new_tokens=10, stop=frozenset({8})))
    assert found.tokens == (5, 6, 7, 8)
    assert found.stopped
    found = answer(Counter(), [3, 4], Sampling(new_tokens=3, suppressed=frozenset({5, 999})))
    assert found.tokens[0] != 5
    assert (found.n_suppressed, found.stopped, len(found.tokens)) == (1, False, 3)


def test_sampling_is_repeatable_and_keeps_to_the_likely() -> None:
    sampling = Sampling(new_tokens=12, temperature=0.5, top_p=0.9, seed=7)
    assert answer(Counter(), [1], sampling).tokens == answer(Counter(), [1], sampling).tokens
    narrow = Sampling(new_tokens=6, temperature=1.0, top_p=0.1)
    assert answer(Counter(), [1], narrow).tokens == (2, 3, 4, 5, 6, 7)


def test_nonfinite_logits_are_counted() -> None:
    def broken(*_: Any) -> tuple[torch.Tensor, Any]:
        return torch.full((1, 1, 4), torch.nan), True

    assert answer(broken, [1], Sampling(new_tokens=2)).n_nonfinite == 2


def test_flags_are_changed_where_they_reach_the_compiler(checkpoint: Path, tmp_path: Path) -> None:
    own = "-O1 --internal-hlo2tensorizer-options='--modular-flow-mac-threshold=10 --verify-hlo=true'"
    application = SimpleNamespace(models=[SimpleNamespace(tag="context_encoding_model", compiler_args=own)])
    config = CompilationConfig(object, object, None, checkpoint, tmp_path, compiler_args="--lnc=1")
    passed = apply_flags(application, config, experts=True)["context_encoding_model"]
    assert passed == application.models[0].compiler_args
    assert "--verify-hlo=false" in passed
    assert "--verify-hlo=true" not in passed
    assert passed.endswith("--enable-internal-neff-wrapper --lnc=1")
    kept = CompilationConfig(object, object, None, checkpoint, tmp_path, verify_hlo=True)
    application.models[0].compiler_args = own
    assert apply_flags(application, kept, experts=False) == {"context_encoding_model": own}


def test_the_environment_is_put_back(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_LOG_LEVEL", "ERROR")
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    config = CompilationConfig(object, object, None, checkpoint, tmp_path)
    variables = environment(config, experts=True, work_folder=tmp_path)
    with set_for_now(variables):
        assert os.environ["NEURON_RT_LOG_LEVEL"] == "INFO"
        assert "--model-type=transformer -O1" in os.environ["NEURON_CC_FLAGS"]
    assert os.environ["NEURON_RT_LOG_LEVEL"] == "ERROR"
    assert "NEURON_CC_FLAGS" not in os.environ


def test_a_saved_configuration_keeps_every_argument(tmp_path: Path) -> None:
    neuron = {
        "tp_degree": 4,
        "batch_size": 2,
        "seq_len": 256,
        "max_context_length": 128,
        "torch_dtype": "float32",
        "fused_qkv": True,
        "glu_type": "swiglu",
        "token_generation_buckets": [128, 256],
        "lora_config": None,
    }
    (tmp_path / "neuron_config.json").write_text(json.dumps({"neuron_config": neuron, "num_hidden_layers": 2}))
    saved = read_saved_config(tmp_path)
    assert (saved.tp, saved.batch, saved.seq_len, saved.context, saved.dtype) == (4, 2, 256, 128, "float32")
    assert saved.options == {"fused_qkv": True, "glu_type": "swiglu", "token_generation_buckets": [128, 256]}
    restored = SimpleNamespace(to_json_string=lambda: json.dumps({"neuron_config": {**neuron, "fused_qkv": False}}))
    assert lost_on_the_way(tmp_path, restored) == ["fused_qkv: True -> False"]
    with pytest.raises(InputError, match=r"holds no neuron_config\.json"):
        read_saved_config(tmp_path / "nowhere")


def match(n_greedy: int, n_forced: int, *, explained: bool | None, beyond: int = 0) -> PromptTokenMatch:
    missed = n_greedy < 20 or beyond
    return PromptTokenMatch(0, 20, n_greedy, n_forced, 20, 5 if missed else None, explained, 0.5, 0, beyond)


@pytest.mark.parametrize(
    ("prompts", "verdict"),
    [
        ([match(20, 20, explained=None)], "pass"),
        ([match(19, 19, explained=False)], "pass"),  # 95 %, whatever the reason
        ([match(8, 20, explained=True)], "undecided"),
        ([match(8, 20, explained=False)], "fail"),
        ([match(8, 20, explained=None)], "fail"),  # of what is not known nothing is excused
        ([match(8, 12, explained=True)], "fail"),  # too often for close calls
        ([match(20, 20, explained=None, beyond=5)], "fail"),  # it should have ended
    ],
)
def test_tokens_pass_at_95_percent_and_rounding_excuses_only_what_it_explains(
    prompts: list[PromptTokenMatch], verdict: str
) -> None:
    assert TokenMatch(tuple(prompts)).verdict == verdict


def test_a_validation_file_is_the_autoport_skills(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text("")
    (tmp_path / "model").mkdir()
    body = {
        "model_name": "small",
        "model_class": "port.py:NeuronSmall",
        "config_class": "port.py:SmallConfig",
        "model_path": "model",
        "compiled_model_path": "compiled",
        "tp_degree": 8,
        "num_tokens_to_check": 64,
        "test_parameters": [{"batch_size": 1, "seq_len": 2048}],
    }
    (file := tmp_path / "validation_config.json").write_text(json.dumps(body))
    config = read_validation_config(file)
    assert config.model_class == f"{tmp_path / 'port.py'}:NeuronSmall"
    assert config.model_path == tmp_path / "model"
    assert (config.tp_degree, config.test_parameters) == (8, ((1, 2048),))
    for change, said in (({"tokens": 3}, "unknown keys: tokens"), ({"model_path": None}, "cannot be read")):
        file.write_text(json.dumps({**body, **change}))
        with pytest.raises(InputError, match=said):
            read_validation_config(file)


def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path
) -> None:
    (file := tmp_path / "config.json").write_text("{}")
    for arguments in (
        ["validate", "--config", str(tmp_path / "nowhere.json")],
        ["validate", "--config", str(file)],
        ["validate", "--config", str(file), "--accuracy-only", "--performance-only"],
        ["compile", str(checkpoint), "--port", "nowhere.py:Port", "-o", str(tmp_path / "out"), "--cpu"],
        ["infer", str(checkpoint), "--port", "nowhere.py:Port", "--prompt", "1,2", "--cpu"],
    ):
        assert main(["port", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


PORT = """
import torch
from neuronx_distributed_inference.models.llama.modeling_llama import LlamaInferenceConfig, NeuronLlamaForCausalLM


class Config(LlamaInferenceConfig):
    pass


class Good(NeuronLlamaForCausalLM):
    @classmethod
    def get_config_cls(cls):
        return Config


class Bad(Good):
    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        state_dict = NeuronLlamaForCausalLM.convert_hf_to_neuron_state_dict(state_dict, config)
        for name in list(state_dict):
            if name.endswith("mlp.down_proj.weight"):
                state_dict[name] = -state_dict[name]
        return state_dict
"""
#: Runs in a process of its own, since the stand-in for the SDK is installed for good.
SCRIPT = '''
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
from tensorsleuth.capture.nxdi.application import CpuSettings
from tensorsleuth.capture.nxdi.port import load_class, parse_class
from tensorsleuth.capture.nxdi.rank_process import join_alone
from tensorsleuth.porting.running import device_logits, session, validation, worker
from tensorsleuth.porting.running.validation_config import ValidationConfig
from tensorsleuth.porting.running.compiler import DirectModelCompiler
from tensorsleuth.porting.running.configuration import CompilationConfig
from tensorsleuth.porting.running.inference import run_inference_with_classes
from tensorsleuth.porting.structure.meta import port_classes

folder, model = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
good, config = port_classes(f"{folder / 'modeling_port.py'}:Good")


def in_this_process(scratch, tp):
    """One rank needs no process of its own; what a rank does is the same."""
    from neuronx_distributed.parallel_layers import parallel_state
    job = json.loads((scratch / "job.json").read_text())
    found.setdefault("jobs", []).append(job)
    try:
        return {0: worker.run_job(job, 0)}, {}
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


session._run_ranks = in_this_process
cpu = DirectModelCompiler(CompilationConfig(
    good, config, None, model, folder / "cpu", batch_size=2, seq_len=64, use_fp16=False, reduce_layers=2, on_cpu=True,
    neuron_options={"fused_qkv": True}))
found["cpu"] = [cpu.compile(), vars(cpu.report)]
device = DirectModelCompiler(CompilationConfig(
    good, config, None, model, folder / "device", seq_len=64, tp_degree=3, modules_to_capture="*mlp.down_proj",
    blockwise_matmul_config={"block_size": 4}))
found["device"] = [device.compile(), vars(device.report)]
answers = {}
compiled = {"compiled_path": folder / "cpu", "num_layers": 2}
for name, options in (("plain", {"dtype": "float32"}), ("restored", compiled)):
    answers[name] = run_inference_with_classes(
        good, config, model, prompt=[1, 5, 9], max_new_tokens=6, cpu_mode=True, **options)
found["answers"] = answers


class LoadedOnCpu:
    """What a device would hold, built on the CPU: everything that drives it is the device's code."""

    def __init__(self, port, compiled, *, pad_token=0):
        from neuronx_distributed.parallel_layers import parallel_state
        from tensorsleuth.capture.nxdi.adapter import NxdiCausalModel
        from tensorsleuth.capture.nxdi.application import build_application, build_config
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        else:
            join_alone()
        port_class = load_class(parse_class(port))
        configuration = build_config(port_class, config, model, CpuSettings(torch.bfloat16, 1, 1, 64))
        self.application = build_application(port_class, configuration, model, 0, 1)
        self.model = NxdiCausalModel(self.application, batch=1, length=64, pad_token=0, one_by_one=False)


validation.DevicePort = device_logits.DevicePort = LoadedOnCpu
asked = ValidationConfig(
    f"{folder / 'modeling_port.py'}:Bad", f"{folder / 'modeling_port.py'}:Config", model,
    compiled_model_path=folder / "cpu", num_tokens_to_check=5, prompts=((1, 5, 9), (1, 7, 3, 30)))
(case,) = validation.validate(asked, validation.Plan(smoke=False), folder / "results-bad")
found["bad"] = {"verdict": case.verdict, **asdict(case)}
print(json.dumps(found, default=str))
'''


@needs_sources
def test_a_port_is_built_answers_and_is_validated_and_compiled_up_to_the_sdk(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "modeling_port.py").write_text(PORT)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(checkpoint)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    success, report = found["cpu"]
    assert success, report
    assert report["artifacts"].keys() == {"neuron_config.json"}
    saved = json.loads((tmp_path / "cpu" / "neuron_config.json").read_text())
    assert saved["num_hidden_layers"] == 2
    assert (saved["neuron_config"]["fused_qkv"], saved["neuron_config"]["torch_dtype"]) == (True, "float32")

    success, report = found["device"]
    if not find_environment().has_sdk:
        assert not success
        assert "no Neuron SDK" in report["error"]
        assert set(report["compiler_args"]) == {"context_encoding_model", "token_generation_model"}
        assert all("--verify-hlo=false" in words for words in report["compiler_args"].values())
        assert any("64 is not divisible by tp_degree 3" in text for text in report["advice"])
        assert any("blockwise_matmul_config is for experts" in text for text in report["notes"])
        config = json.loads((tmp_path / "device" / "neuron_config.json").read_text())["neuron_config"]
        assert config["tensor_capture_config"]["modules_to_capture"] == [
            f"layers.{layer}.mlp.down_proj" for layer in range(3)
        ]
        assert config["world_size"] == 3
        kept = Path(report["failure_folder"])
        assert {path.name for path in kept.iterdir()} == {
            "hlo_artifacts",
            "compilation_config.json",
            "compilation.log",
        }

    jobs = found["jobs"][-2:]
    assert (jobs[1]["dtype"], jobs[1]["batch"], jobs[1]["length"]) == ("float32", 2, 64)  # as it was compiled
    assert jobs[1]["options"]["fused_qkv"] is True
    _, text, metrics = found["answers"]["plain"]
    golden = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = golden.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert metrics["tokens"] == ids
    assert text == " ".join(map(str, ids))
    assert metrics["input_tokens"] == 3
    assert metrics["tp_degree"] == 1

    bad = found["bad"]
    (stage,) = bad["stages"]
    assert bad["verdict"] == stage["verdict"] == "fail"
    assert stage["details"]["ran_free"] is True
    assert stage["details"]["greedy_match"] < 0.5
    assert stage["details"]["misses_explained_by_rounding"] < 1.0
    assert any("sleuth logits" in note for note in bad["notes"])


@needs_sources
def test_a_correct_port_passes_validation(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "modeling_port.py").write_text(PORT)
    body = {
        "model_class": "modeling_port.py:Good",
        "config_class": "modeling_port.py:Config",
        "model_path": str(checkpoint),
        "num_tokens_to_check": 5,
        "prompts": [[1, 5, 9], [1, 7, 3, 30]],
    }
    (file := tmp_path / "validation_config.json").write_text(json.dumps(body))
    folder = tmp_path / "results"
    arguments = ["--config", str(file), "--cpu", "--accuracy-only", "--results-dir", str(folder), "--json"]
    assert main(["port", "validate", *arguments]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    (stage,) = report["stages"]
    assert json.loads((folder / "validation_token_b1_s64.json").read_text())["verdict"] == "pass"
    assert Path(report["trace"]).is_dir()
    assert (stage["details"]["greedy_match"], stage["details"]["teacher_forced_match"]) == (1.0, 1.0)
    assert stage["details"]["ran_free"] is False
    assert stage["details"]["prompts"][1]["n_forced_positions"] == 5  # the last of prefill, then decode
