"""Weights that are widened layer by layer: the same values, with one layer's weights in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch and transformers: pip install 'tensorsleuth[capture]'")

import torch
from tensorsleuth.capture import hf, widening
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource, load_model
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.capture.widening import computes_in, is_too_large
from tensorsleuth.store import InputError, Trace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4),
    "gemma2": Gemma2Config(**_SIZES, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "t5": T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
}
TOKENS = [PromptInput("a", token_ids=(5, 9, 11, 7, 30, 8)), PromptInput("b", token_ids=(6, 12, 33))]


def checkpoint(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    family.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_is_that_of_the_model_in_fp32(name: str, tmp_path: Path) -> None:
    folder = checkpoint(CONFIGS[name], tmp_path / "model")
    trace = Trace.create(tmp_path / "trace")
    for run, by_layer in (("whole", False), ("layers", True)):
        source = ModelSource(folder, by_layer=by_layer)
        generation = Generation(new_tokens=3, batch_size=2)
        request = HuggingFaceCapture(source, run, "reference", prompts=TOKENS, generation=generation)
        assert capture_hugging_face(trace, request).observer["identical"]
        manifest = trace.manifest(run)
        assert (manifest.dtype, manifest.provenance["weights_widened_by_layer"]) == ("float32", by_layer)
    stored = """SELECT module, port, slot, call, phase, step, prompt, dtype, checksum FROM tensors
                WHERE run = ? AND phase <> 'static' ORDER BY ALL"""
    whole, layers = (trace.query(stored, [run]).to_pylist() for run in ("whole", "layers"))
    assert len(whole) > 50
    assert layers == whole


def test_weights_stay_narrow_between_forwards_and_after_one_that_raises(tmp_path: Path) -> None:
    model = load_model(ModelSource(checkpoint(CONFIGS["llama"], tmp_path), by_layer=True), torch.float32)
    seen: list[torch.dtype] = []
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: seen.append(weight.dtype))
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(weight.dtype))
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
        assert seen == [torch.bfloat16, torch.float32]
        with pytest.raises(TypeError):
            model.model.layers[1].mlp("no tensor")
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(_stop)
        with pytest.raises(ValueError, match="stop"):
            model(torch.tensor([[5, 6]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert computes_in(model) == torch.float32


def _stop(*_: Any) -> None:
    raise ValueError("stop")


def test_weights_that_would_not_fit_are_widened_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(CONFIGS["llama"], tmp_path / "model")
    size = 4 * sum(p.numel() for p in load_model(ModelSource(folder), torch.float32).parameters())
    for free, too_large in ((2 * size, False), (size, True), (None, False)):
        monkeypatch.setattr(widening, "_free_memory", lambda free=free: free)
        assert is_too_large(folder, torch.float32) == too_large
        model = load_model(ModelSource(folder), torch.float32)
        assert computes_in(model) == (torch.float32 if too_large else None)
    monkeypatch.setattr(widening, "_free_memory", lambda: 0)
    assert computes_in(load_model(ModelSource(folder), torch.bfloat16)) is None
    (folder / "model.safetensors").write_bytes(b"\xff")
    with pytest.raises(InputError, match="its header cannot be read"):
        is_too_large(folder, torch.float32)
    assert hf.load_model is load_model


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/status: run it on Linux")
def test_memory_holds_one_layer(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    folder = checkpoint(config, tmp_path / "model")
    code = """
import json, sys, torch
from pathlib import Path
from tensorsleuth.capture.hf import ModelSource, load_model, quiet_transformers

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

quiet_transformers()
torch.set_num_threads(1)
load_model(ModelSource(Path(sys.argv[2]), by_layer=True), torch.float32)  # imports what it needs
before = anonymous()
model = load_model(ModelSource(Path(sys.argv[1]), by_layer=True), torch.float32)
taken, parameters, wide = anonymous() - before, list(model.parameters()), [0]
for layer in model.model.layers:
    wide_now = lambda *_: sum(p.nbytes for p in parameters if p.dtype == torch.float32)
    layer.mlp.register_forward_hook(lambda *_: wide.append(wide_now()))
with torch.no_grad():
    model(torch.tensor([[5, 6, 7]]))
size = sum(p.numel() for p in parameters) * 4
print(json.dumps([taken / size, max(wide) / size, sum(p.nbytes for p in parameters) / size]))
"""
    command = [sys.executable, "-c", code, str(folder), str(checkpoint(CONFIGS["llama"], tmp_path / "small"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, wide, narrow = json.loads(done.stdout)
    assert taken < 0.25  # a copy of the weights in BF16 would be half of what they take in FP32
    assert wide == pytest.approx(1 / 16, rel=0.01)
    assert narrow == 0.5
