"""The files that NxD Inference's own hook writes import like the ones that the other tests write for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_dumps import MODULES, PAD, hidden_states, write_tokens
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.importers import ImportOptions, import_dump
from tensorsleuth.capture.nxdi.run import NxdiCapture, capture_on_cpu
from tensorsleuth.capture.pending import to_numpy
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.store import Trace
from transformers import LlamaConfig, LlamaForCausalLM

SOURCES = [os.environ.get(name, "") for name in ("NXDI_SRC", "NXD_SRC")]
pytestmark = pytest.mark.skipif(
    not all(SOURCES), reason="needs NxD Inference's sources: set NXDI_SRC and NXD_SRC to the folders of its packages"
)

PROMPTS, FED = [[3, 4, 5, 6, 7], [8, 9, 10]], [[11, 12], [14, 15]]
#: Hands every forward pass's tensors to the hook, as the application does.
DRIVE = """
import sys
from types import SimpleNamespace
import torch
from tensorsleuth.capture.nxdi import stand_in
sys.path[:0] = sys.argv[3:]
stand_in.install()
from neuronx_distributed_inference.utils.tensor_capture_utils import get_tensor_capture_hook

modules, passes = torch.load(sys.argv[1], weights_only=True)
config = SimpleNamespace(modules_to_capture=modules, capture_inputs=False)
application = SimpleNamespace(neuron_config=SimpleNamespace(tensor_capture_config=config))
hook = get_tensor_capture_hook(tensor_capture_save_dir=sys.argv[2])
for captured in passes:
    hook(application, captured)
"""


def passes() -> list[list[torch.Tensor]]:
    """Every forward pass of both prompts: a module that recorded nothing, and an unused slot for manual tensors."""
    found = []
    for prompt, fed in zip(PROMPTS, FED, strict=True):
        padded = [*prompt, *[PAD] * (8 - len(prompt))]
        steps = [(padded, 0), *(([token], len(prompt) + index) for index, token in enumerate(fed))]
        for tokens, start in steps:
            captured = [hidden_states(module, tokens, start) for module in MODULES]
            last = len(prompt) - 1 if start == 0 else 0
            captured[-1] = captured[-1][:, last : last + 1]
            nothing = torch.zeros(1, dtype=torch.bfloat16)
            found.append([*captured, nothing, torch.full((1,), float("nan"), dtype=torch.bfloat16)])
    return found


def test_the_hooks_own_files_import(trace: Trace, tmp_path: Path, read: Any) -> None:
    torch.save([[*MODULES, "layers.1"], passes()], tmp_path / "passes.pt")
    command = [sys.executable, "-c", DRIVE, str(tmp_path / "passes.pt"), str(tmp_path / "dump"), *SOURCES]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    tokens = write_tokens(
        tmp_path / "t.jsonl",
        [{"token_ids": p + f, "n_prompt": len(p)} for p, f in zip(PROMPTS, FED, strict=True)],
    )
    options = ImportOptions(tokens=tokens)
    summary = import_dump(trace, tmp_path / "dump", run="t", role="target", options=options)
    assert (summary.format, summary.n_tensors, summary.positions) == ("nxdi", 30, 30)
    assert len(summary.skipped) == 6
    assert all("layers.1 recorded nothing" in reason for reason in summary.skipped.values())
    for stored in read(trace):
        row, prompt = stored.row, PROMPTS[stored.row["prompt"]]
        step = row["step"]
        ids = prompt if step == 0 else [FED[row["prompt"]][step - 1]]
        wanted = to_numpy(hidden_states(row["module"], ids, 0 if step == 0 else len(prompt) + step - 1))
        wanted = wanted[:, -1:] if row["module"] == "lm_head" else wanted
        np.testing.assert_array_equal(stored.values.view(np.uint16), wanted.view(np.uint16))


LLAMA = "neuronx_distributed_inference.models.llama.modeling_llama:NeuronLlamaForCausalLM"
#: Generates with the real model, through the library's own capture and its own hook, and leaves its files.
GENERATE = """
import json, sys
from pathlib import Path
import torch
from tensorsleuth.capture.drive import run_prompts
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.nxdi.adapter import NxdiCausalModel
from tensorsleuth.capture.nxdi.application import CpuSettings, build_application, build_config
from tensorsleuth.capture.nxdi.captured import library_capture
from tensorsleuth.capture.nxdi.device_plan import ON_DEVICE_SAMPLING, plan_device_capture
from tensorsleuth.capture.nxdi.port import activate, load_class, parse_class
from tensorsleuth.capture.nxdi.rank_process import join_alone
from tensorsleuth.capture.prompts import EncodedPrompt
from tensorsleuth.capture.selection import Selection

path, dump, port = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
prompts = [EncodedPrompt(str(i), None, tuple(p), tuple(f)) for i, (p, f) in enumerate(json.loads(sys.argv[4]))]
activate()
from neuronx_distributed_inference.utils.tensor_capture_utils import get_tensor_capture_hook

join_alone()
port = load_class(parse_class(port))
settings = CpuSettings(torch.bfloat16, 1, 1, 64, ON_DEVICE_SAMPLING)
application = build_application(port, build_config(port, port.get_config_cls(), path, settings), path, 0, 1)
model = application.models[0].model
kinds = {name: type(module).__name__ for name, module in model.named_modules()}
(only,) = plan_device_capture(kinds, Selection(), budget=2 * len(kinds)).passes
hook = get_tensor_capture_hook(tensor_capture_save_dir=dump)
drive = NxdiCausalModel(application, batch=1, length=64, pad_token=0, one_by_one=False,
                        options={"tensor_capture_hook": hook})
with torch.no_grad(), library_capture(model, only):
    run_prompts(drive, prompts, Generation(padding="right"), drive.step, tokens=[])
"""
TWO_PROMPTS = (tuple(range(2, 9)), tuple(range(30, 41)))


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Path]:
    """A trace with our own capture of a two-prompt generation and the hook's dump of the same."""
    folder = tmp_path_factory.mktemp("generation")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    trace = Trace.create(folder / "trace")
    prompts = [PromptInput(str(i), token_ids=prompt) for i, prompt in enumerate(TWO_PROMPTS)]
    source = ModelSource(folder / "model")
    request = HuggingFaceCapture(source, "ref", "reference", prompts=prompts, generation=Generation(new_tokens=5))
    capture_hugging_face(trace, request)
    capture_on_cpu(trace, NxdiCapture(folder / "model", LLAMA, "ours", "target", dtype="bfloat16", teacher="ref"))
    lengths = {prompt.prompt: prompt.n_tokens for prompt in trace.manifest("ref").prompts}
    fed = [(list(t.token_ids[: lengths[t.prompt]]), list(t.token_ids[lengths[t.prompt] :]))
           for t in trace.manifest("ref").tokens]  # fmt: skip
    command = [sys.executable, "-c", GENERATE, str(folder / "model"), str(folder / "dump"), LLAMA, json.dumps(fed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return trace, folder / "dump"


def test_the_hooks_files_of_a_real_generation_are_our_own_capture_bit_for_bit(generation: tuple[Trace, Path]) -> None:
    trace, dump = generation
    names = {path.name for path in dump.iterdir()}
    assert "captured_tensors_tkg_step_6_module_norm_output.pt" in names  # the second prompt's prefill, by its label
    summary = import_dump(trace, dump, run="dump", role="target", options=ImportOptions(tokens_from="ref"))
    assert (summary.format, summary.n_prompts, summary.skipped) == ("nxdi", 2, {})
    assert trace.manifest("dump").tokens == tuple(replace(t, forced_from=None) for t in trace.manifest("ours").tokens)
    rows = trace.query(
        """SELECT d.module, d.slot, d.phase, d.prompt, d.step, d.position_start, d.position_count, d.shape, o.shape AS
                  our_shape, d.dtype, o.dtype AS our_dtype, d.checksum = o.checksum AS same
           FROM tensors d LEFT JOIN tensors o ON o.run = 'ours' AND o.module = d.module AND o.port = d.port AND
                o.prompt = d.prompt AND o.phase = d.phase AND o.step = d.step AND o.position_start = d.position_start
                AND o.position_count = d.position_count AND o.slot IN (d.slot, '0')
           WHERE d.run = 'dump'"""
    ).to_pylist()
    differing = [row for row in rows if not row["same"]]
    assert differing == []
    assert {(row["prompt"], row["phase"]) for row in rows} == {(p, f) for p in (0, 1) for f in ("prefill", "decode")}
    steps = {row["step"] for row in rows}
    assert steps == {0, 1, 2, 3, 4}
    modules = {row["module"] for row in rows}
    assert {"embed_tokens", "layers.1.self_attn.o_proj", "layers.0.mlp", "norm", "lm_head"} <= modules
    assert len(rows) == len(modules) * 2 * 5
