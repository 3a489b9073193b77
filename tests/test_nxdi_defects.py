"""What NxD Inference's own tensor capture gets wrong, shown on its own code: why sleuth replaces and re-arms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not (os.environ.get("NXDI_SRC") and os.environ.get("NXD_SRC")),
    reason="needs the NxD Inference sources: set NXDI_SRC and NXD_SRC to checkouts of them",
)
SCRIPT = """
import json, sys, tempfile
from pathlib import Path
import torch
from tensorsleuth.capture.nxdi.application import CpuSettings, build_application, build_config
from tensorsleuth.capture.nxdi.device_plan import ON_DEVICE_SAMPLING
from tensorsleuth.capture.nxdi.port import activate, load_class, parse_class

activate()
from neuronx_distributed.utils.tensor_capture import enable_tensor_capture, get_available_modules
from neuronx_distributed_inference.models.config import NeuronConfig, TensorCaptureConfig

found = {}
try:
    NeuronConfig(tensor_capture_config={"modules_to_capture": ["norm"]})
except Exception as error:
    found["without_sampling"] = type(error).__name__
store = f"file://{tempfile.mkdtemp()}/f"
torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
path = Path(sys.argv[1])
port = load_class(parse_class("neuronx_distributed_inference.models.llama.modeling_llama:NeuronLlamaForCausalLM"))
config = build_config(port, port.get_config_cls(), path, CpuSettings(torch.float32, 1, 1, 64, ON_DEVICE_SAMPLING))
application = build_application(port, config, path, 0, 1)
model = application.models[0].model
names = get_available_modules(model)
found["duplicates"] = len(names) - len(set(names))
modules = ["layers.0.self_attn", "layers.0.self_attn.qkv_proj", "norm", "layers.1.self_attn.rotary_emb"]
model.neuron_config.tensor_capture_config = TensorCaptureConfig(modules_to_capture=modules)
enable_tensor_capture(model, modules, None, False)
seen = {}
model.layers[0].self_attn.register_forward_hook(lambda m, a, o: seen.update(cos=o.cos_cache, out=o.hidden_states))
model.layers[0].self_attn.qkv_proj.register_forward_hook(lambda m, a, o: seen.update(q=o[0]))
captures = []
hook = lambda app, tensors: captures.append([t.clone() for t in tensors])
with torch.no_grad():
    ids = torch.tensor([[5, 6, 7]])
    sampling = torch.ones(1, 3)
    application(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(3)[None],
                seq_ids=torch.arange(1), sampling_params=sampling, tensor_capture_hook=hook)
    attention, projection, norm, rotary = captures[0]
    found["attention_is_cosine"] = torch.equal(attention, seen["cos"]) and attention.shape != seen["out"].shape
    found["projection_is_queries"] = torch.equal(projection, seen["q"])
    found["uncalled"] = [str(rotary.dtype), list(rotary.shape), float(rotary)]
    found["norm_at_first_step"] = list(norm.shape)
    application(torch.tensor([[8]]), attention_mask=None, position_ids=torch.tensor([[3]]),
                seq_ids=torch.arange(1), sampling_params=sampling, tensor_capture_hook=hook)
    found["norm_at_second_step"] = list(captures[1][2].shape)
extra = TensorCaptureConfig(modules_to_capture=["norm"], auto_capture_moe_tensors=True)
found["moe_offset"] = extra.get_offset()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the library did."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    script = Path(folder) / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_capture_of_an_attention_is_the_rotary_cosine(found: dict[str, Any]) -> None:
    assert found["attention_is_cosine"]


def test_capture_of_the_projections_is_the_queries(found: dict[str, Any]) -> None:
    assert found["projection_is_queries"]


def test_a_module_that_is_not_called_yields_one_zero(found: dict[str, Any]) -> None:
    assert found["uncalled"] == ["torch.bfloat16", [1], 0.0]


def test_capture_needs_on_device_sampling(found: dict[str, Any]) -> None:
    assert found["without_sampling"] == "IncompatibleConfigError"


def test_on_a_cpu_the_list_of_modules_is_lost_after_the_first_step(found: dict[str, Any]) -> None:
    assert found["norm_at_first_step"] == [1, 64, 32]
    assert found["norm_at_second_step"] == [1]


def test_available_modules_are_listed_twice(found: dict[str, Any]) -> None:
    assert found["duplicates"] > 0


def test_automatic_capture_of_experts_reserves_a_slot(found: dict[str, Any]) -> None:
    assert found["moe_offset"] == 2
