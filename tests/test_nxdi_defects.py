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
import json, sys
from pathlib import Path
import torch
from tensorsleuth.capture.nxdi.application import CpuSettings, build_application, build_config
from tensorsleuth.capture.nxdi.device_plan import ON_DEVICE_SAMPLING
from tensorsleuth.capture.nxdi.port import activate, load_class, parse_class
from tensorsleuth.capture.nxdi.rank_process import join_alone

activate()
from neuronx_distributed.utils.tensor_capture import enable_tensor_capture, get_available_modules
from neuronx_distributed_inference.models.config import NeuronConfig, TensorCaptureConfig

found = {}
try:
    NeuronConfig(tensor_capture_config={"modules_to_capture": ["norm"]})
except Exception as error:
    found["without_sampling"] = type(error).__name__
join_alone()
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

#: Defects that need an application of another kind, or a part of the library alone.
OTHERS = """
import json, sys, tempfile
from pathlib import Path
import torch
from tensorsleuth.capture.nxdi.application import CpuSettings, build_application, build_config
from tensorsleuth.capture.nxdi.captured import library_capture
from tensorsleuth.capture.nxdi.device_plan import ON_DEVICE_SAMPLING, DevicePass
from tensorsleuth.capture.nxdi.port import activate, load_class, parse_class
from tensorsleuth.capture.nxdi.rank_process import join_alone

activate()
from neuronx_distributed.modules.moe.routing import RouterTopK
from neuronx_distributed.utils.tensor_capture import enable_tensor_capture
from neuronx_distributed.utils.tensor_capture.registry import TensorRegistry
from neuronx_distributed_inference.models.config import TensorCaptureConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseModel
from neuronx_distributed_inference.utils import tensor_capture_utils

found = {}
join_alone()
path = Path(sys.argv[1])
port = load_class(parse_class("neuronx_distributed_inference.models.llama.modeling_llama:NeuronLlamaForCausalLM"))

def build(options, batch=1):
    settings = CpuSettings(torch.float32, 1, batch, 64, options)
    return build_application(port, build_config(port, port.get_config_cls(), path, settings), path, 0, 1)

def run(application, hook):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        return application(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(3)[None],
                           seq_ids=torch.arange(1), sampling_params=torch.ones(1, 3), tensor_capture_hook=hook)

# logits without on-device sampling
application, calls = build({"output_logits": True}), []
application._copy_past_key_values = lambda outputs: None  # on a CPU it would trip over the captured tensors
with library_capture(application.models[0].model, DevicePass(("norm",), False)):
    output = run(application, lambda *a: calls.append(a))
found["calls_without_sampling"] = len(calls)
found["captured_without_sampling"] = getattr(output, "captured_tensors", None) is not None

# the slot that automatic capture of experts reserves, and a CPU model as the library itself makes it
application, calls = build(ON_DEVICE_SAMPLING), []
model = application.models[0].model
with library_capture(model, DevicePass(("norm",), False)):
    model.neuron_config.tensor_capture_config = TensorCaptureConfig(
        modules_to_capture=["norm"], auto_capture_moe_tensors=True)
    run(application, lambda _, tensors: calls.append([t.clone() for t in tensors]))
found["reserved"] = [bool(torch.isnan(calls[0][-1])), list(calls[0][-1].shape), len(calls[0])]

settings = CpuSettings(torch.float32, 1, 1, 64, ON_DEVICE_SAMPLING)
config = build_config(port, port.get_config_cls(), path, settings)
config.neuron_config.tensor_capture_config = TensorCaptureConfig(modules_to_capture=["norm"])
application, calls = port(str(path), config), []
application.to_cpu()
found["hooks_after_to_cpu"] = len(TensorRegistry.get_instance().model_info.hooks)
run(application, lambda _, tensors: calls.append([t.clone() for t in tensors]))
found["captured_after_to_cpu"] = [list(calls[0][0].shape), float(calls[0][0])]

# a router alone, under the library's hooks and its choice of a tensor
torch.manual_seed(0)
router = RouterTopK(num_experts=4, top_k=2, hidden_size=8)
holder = torch.nn.Module()
holder.mlp = torch.nn.Module()
holder.mlp.router = router
enable_tensor_capture(holder, ["mlp.router"], None, False)
outputs = router(torch.randn(1, 5, 8))
tensors = TensorRegistry.get_instance().get_module_tensors()
kept = NeuronBaseModel._find_first_captured_tensor_for_module(None, tensors, "mlp.router", "outputs", "cpu")
found["router_outputs"] = len(outputs)
found["router_keeps_logits"] = torch.equal(kept, outputs[0])
found["router_is_flattened"] = list(kept.shape)

# one sequence of two, on a device: rows are selected in every tensor that the graph returns
wrapper = build({"is_continuous_batching": True, **ON_DEVICE_SAMPLING}, batch=2).models[1]
hidden = torch.arange(2.0)[:, None, None].expand(2, 1, 3)
flattened = torch.arange(2 * 4.0)[:, None].expand(2 * 4, 3)
wrapper.is_neuron = lambda: True
wrapper._forward = lambda *_: [torch.zeros(2, 1), torch.zeros(2, 1, 9), hidden, flattened]
tokens, logits, one, rows = wrapper._forward_with_pad(
    torch.tensor([[5]]), torch.ones(1, 64), torch.tensor([[3]]), torch.tensor([1]), torch.ones(1, 3))
found["hidden_of_sequence_1"] = one[:, 0, 0].tolist()
found["rows_of_sequence_1"] = rows[:, 0].tolist()

# one metadata file for every tensor
from types import SimpleNamespace
n, writes = 12, []
save = tensor_capture_utils.TensorCaptureMetadata._save
def counted(self):
    save(self)
    writes.append(Path(self.metadata_file).stat().st_size)
tensor_capture_utils.TensorCaptureMetadata._save = counted
names = [f"layers.{i}" for i in range(n)]
owner = SimpleNamespace(neuron_config=SimpleNamespace(tensor_capture_config=SimpleNamespace(
    modules_to_capture=names, capture_inputs=False)))
tensor_capture_utils.get_tensor_capture_hook(tensor_capture_save_dir=tempfile.mkdtemp())(
    owner, [torch.zeros(1, 2, 3) for _ in names])
found["metadata"] = [len(writes), sum(writes) / writes[-1]]
print(json.dumps(found))
"""


def run_script(folder: Path, text: str) -> dict[str, Any]:
    """Run a script on the model in a folder, in a process of its own, and read the line that it prints."""
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def others(llama: Path) -> dict[str, Any]:
    """What the library did in the cases of `OTHERS`."""
    return run_script(llama, OTHERS)


@pytest.fixture(scope="module")
def found(llama: Path) -> dict[str, Any]:
    """What the library did in the cases of `SCRIPT`."""
    return run_script(llama, SCRIPT)


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


def test_that_slot_stays_empty(others: dict[str, Any]) -> None:
    assert others["reserved"] == [True, [1], 2]


def test_capture_of_a_router_is_its_logits_one_row_a_token(others: dict[str, Any]) -> None:
    assert others["router_outputs"] == 3
    assert others["router_keeps_logits"]
    assert others["router_is_flattened"] == [5, 4]


def test_logits_without_on_device_sampling_leave_the_captures_inside(others: dict[str, Any]) -> None:
    assert others["calls_without_sampling"] == 0
    assert not others["captured_without_sampling"]


def test_on_a_cpu_the_library_never_switches_capture_on(others: dict[str, Any]) -> None:
    assert others["hooks_after_to_cpu"] == 0
    assert others["captured_after_to_cpu"] == [[1], 0.0]


def test_with_continuous_batching_rows_are_selected_in_flattened_tensors_too(others: dict[str, Any]) -> None:
    """The device's branch of the wrapper, on tensors as a graph would return them: the graph itself needs a device."""
    assert others["hidden_of_sequence_1"] == [1.0]
    assert others["rows_of_sequence_1"] == [1.0]  # a token of sequence 0: those of sequence 1 are rows 4 to 7


def test_the_metadata_file_is_written_anew_after_every_tensor(others: dict[str, Any]) -> None:
    n_writes, times_its_size = others["metadata"]
    assert n_writes == 12
    assert times_its_size > 6  # half of n: quadratic in the number of tensors
