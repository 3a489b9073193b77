"""Module trees, the mapping between a model and its port, and what of their differences is suspect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorsleuth.analyze.component_mapping import read_component_mapping
from tensorsleuth.cli.app import main
from tensorsleuth.porting.environment import find_environment
from tensorsleuth.porting.structure.counterparts import map_trees
from tensorsleuth.porting.structure.differences import Difference, find_differences
from tensorsleuth.porting.structure.divergence import find_divergences
from tensorsleuth.porting.structure.meta import source_on_meta
from tensorsleuth.porting.structure.rendering import flat_paths, pretty_lines, write_tree
from tensorsleuth.porting.structure.tree import build_tree, compress
from torch import nn
from transformers.activations import GELUActivation

needs_sources = pytest.mark.skipif(
    find_environment().nxdi is None or find_environment().nxd is None,
    reason="needs the sources of NxD and NxD Inference: set NXDI_SRC and NXD_SRC",
)
Folder = Callable[[str], Path]


def test_the_source_is_built_without_weights(model_folder: Folder) -> None:
    model = source_on_meta(model_folder("llama"))
    assert all(parameter.is_meta for parameter in model.parameters())
    tree = build_tree(model)
    assert tree.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert flat_paths(tree) == [path for path, _ in model.named_modules() if path]


def test_layers_that_are_alike_are_written_once_and_only_those(model_folder: Folder) -> None:
    model = source_on_meta(model_folder("llama"))
    layers: Any = model.model.layers
    (stack,) = [node for node in build_tree(model).walk() if node.path == "model.layers"]
    assert [(group.label, group.count) for group in compress(stack)] == [("[0-1]", 2)]
    layers[1].input_layernorm.variance_epsilon = 1e-3
    (stack,) = [node for node in build_tree(model).walk() if node.path == "model.layers"]
    assert [(group.label, group.count) for group in compress(stack)] == [("0", 1), ("1", 1)]


@pytest.mark.parametrize("attribute", ["sliding_window", "scale"])
def test_a_pattern_of_layers_keeps_its_numbers(attribute: str) -> None:
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    for number, layer in enumerate(layers):
        setattr(layer, attribute, 4096 if number % 3 == 2 else None)
        layer.layer_idx = torch.tensor(0) if number < 0 else number  # a number that says nothing
    groups = compress(build_tree(layers))
    assert [(group.label, group.count) for group in groups] == [("[0-1,3-4]", 4), ("[2,5]", 2)]


def test_the_four_files_of_a_model_agree(model_folder: Folder, tmp_path: Path) -> None:
    tree = build_tree(source_on_meta(model_folder("llama")))
    names = {path.name for path in write_tree(tree, tmp_path, "source")}
    assert names == {
        "model_tree_source.json",
        "model_tree_source_full.json",
        "model_tree_source_pretty.txt",
        "model_tree_source_flat_paths.txt",
    }
    full = json.loads((tmp_path / "model_tree_source_full.json").read_text())
    small = json.loads((tmp_path / "model_tree_source.json").read_text())

    def paths(node: dict[str, Any]) -> list[str]:
        return [node["path"], *(path for child in node["children"] for path in paths(child))]

    flat = (tmp_path / "model_tree_source_flat_paths.txt").read_text().split()
    assert paths(full)[1:] == flat
    assert len(paths(small)) < len(flat)
    assert full["n_parameters"] == small["n_parameters"] == tree.n_parameters
    pretty = (tmp_path / "model_tree_source_pretty.txt").read_text().splitlines()
    assert pretty == list(pretty_lines(tree))
    assert any("[0-1] x 2: LlamaDecoderLayer" in line for line in pretty)


def drop_norm(model: Any) -> None:
    del model.model.layers[1].post_attention_layernorm


def add_norm(model: Any) -> None:
    model.model.layers[0].mlp.extra_norm = nn.LayerNorm(32)


def nest_mlp(model: Any) -> None:
    layer = model.model.layers[0]
    layer.self_attn.mlp = layer.mlp
    del layer.mlp


def drop_layer(model: Any) -> None:
    del model.model.layers[1]


def drop_activation(model: Any) -> None:
    for layer in model.model.layers:
        del layer.mlp.act_fn


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = GELUActivation()


def other_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-3


def narrower_projection(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 40, bias=False, device="meta")


def added_bias(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj = nn.Linear(32, 32, bias=True, device="meta")


def suspects(folder: Path, change: Callable[[Any], None] | None) -> list[Difference]:
    """Suspects of a copy of a model in which something was changed."""
    source, target = source_on_meta(folder), source_on_meta(folder)
    if change is not None:
        change(target)
    trees = build_tree(source), build_tree(target)
    return [item for item in find_differences(*trees, map_trees(*trees)) if not item.expected]


@pytest.mark.parametrize(
    ("change", "kind", "where", "said"),
    [
        (drop_norm, "missing", "model.layers.*.post_attention_layernorm", "no counterpart"),
        (add_norm, "extra", "model.layers.*.mlp.extra_norm", "no counterpart"),
        (nest_mlp, "nesting", "model.layers.*.mlp.gate_proj", "nested elsewhere"),
        (drop_layer, "layers", "model.layers", "2 layers in the source, 1 in the target"),
        (drop_activation, "activation", "model.layers.*.mlp.act_fn", "nowhere"),
        (other_activation, "activation", "model.layers.*.mlp.act_fn", "GELUActivation in the target"),
        (other_epsilon, "epsilon", "model.norm", "0.001 in the target"),
        (narrower_projection, "size", "model.layers.*.mlp.gate_proj", "[40, 32] in the target"),
        (added_bias, "size", "model.layers.*.self_attn.o_proj", "only the target has a bias"),
    ],
)
def test_a_structural_bug_is_a_suspect(
    model_folder: Folder, change: Callable[[Any], None], kind: str, where: str, said: str
) -> None:
    found = suspects(model_folder("llama"), change)
    assert {item.kind for item in found} == {kind}
    assert where in {item.source or item.target for item in found}
    assert all(said in item.reason for item in found)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", "gpt2"])
def test_a_model_has_no_suspects_against_itself(model_folder: Folder, architecture: str) -> None:
    assert suspects(model_folder(architecture), None) == []


_MODELS = "neuronx_distributed_inference.models"
_COMMANDS = """
import contextlib, io, json, sys
from tensorsleuth.cli.app import main
for name, *arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = main([*arguments, "--json"])
    print(json.dumps([name, code, shown.getvalue()]))
"""


@needs_sources
def test_stage_zero_of_ports_of_the_library(model_folder: Folder, tmp_path: Path) -> None:
    mixtral, qwen = str(model_folder("mixtral")), str(model_folder("qwen3"))
    port = f"{_MODELS}.mixtral.modeling_mixtral:NeuronMixtralForCausalLM"
    other = f"{_MODELS}.llama.modeling_llama:NeuronLlamaForCausalLM"
    folder, file = tmp_path / "model_tree", tmp_path / "component_mapping.json"
    commands = [
        ("tree", "port", "tree", mixtral, "--port", port, "-o", str(folder)),
        ("map", "port", "map", mixtral, "--port", port, "-o", str(file)),
        ("other", "port", "map", qwen, "--port", other),
    ]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    results = {name: (code, json.loads(text)) for name, code, text in map(json.loads, done.stdout.splitlines())}
    assert {name: code for name, (code, _) in results.items()} == {"tree": 0, "map": 0, "other": 1}
    assert len(list(folder.iterdir())) == 8
    assert json.loads((folder / "model_tree_target.json").read_text())["class"] == "NeuronMixtralModel"
    body = json.loads(file.read_text())
    entries = {tuple(first): tuple(second) for first, second in body["component_mapping"] if first}
    assert entries["model.layers.{i}.self_attn.q_proj",] == ("layers.{i}.self_attn.qkv_proj.q_proj",)
    assert entries["model.layers.{i}.block_sparse_moe.gate",] == ("layers.{i}.mlp.router.linear_router",)
    assert body["variables"]["i"] == {"range": [0, 1]}
    assert not any("suspect" in reason for reason in body["reasoning"])
    assert len(read_component_mapping(file).components) > len(body["component_mapping"])
    differences = results["map"][1]["differences"]
    assert {(item["kind"], item["expected"]) for item in differences} == {("class", True), ("framework", True)}
    missing = [item for item in results["other"][1]["differences"] if not item["expected"]]
    assert {(item["kind"], item["source"]) for item in missing} == {
        ("missing", "model.layers.*.self_attn.q_norm"),
        ("missing", "model.layers.*.self_attn.k_norm"),
    }


PORT = '''
"""A port. NXD_CPU_MODE is only mentioned here; get_norm() if cpu_mode() else nothing."""
import os
from neuronx_distributed.utils import cpu_mode
from nkilib.core.mlp.mlp import mlp as mlp_kernel
from .norms import pick_norm

ON_CPU = os.environ.get("NXD_CPU_MODE", "0") == "1"


def get_norm():  # if cpu_mode(): return Nothing
    return SlowNorm if cpu_mode() else FastNorm


def get_rope(config):
    if not config.neuron_config.on_cpu:
        return DeviceRope
    return PlainRope


class Layer:
    def __init__(self, config):
        self.norm = get_norm()(4)
        self.other = pick_norm(4)
        self.act = PlainAct() if ON_CPU else KernelAct()
        if "NXD_CPU_MODE" in os.environ:
            self.mlp = PlainMLP(config)
        else:
            self.mlp = KernelMLP(config)
        self.size = 1 if config.tied else 2

    def forward(self, x):
        return mlp_kernel(x)
'''


def test_classes_that_differ_between_cpu_and_device_are_found_in_the_syntax_tree(tmp_path: Path) -> None:
    (tmp_path / "modeling_port.py").write_text(PORT)
    (tmp_path / "norms.py").write_text("from .deeper import pick as pick_norm\n")
    (tmp_path / "deeper.py").write_text(
        "from neuronx_distributed.utils import cpu_mode\n\n\ndef pick(size):\n"
        "    if cpu_mode():\n        return A(size)\n    else:\n        return B(size)\n"
    )
    found = find_divergences(tmp_path / "modeling_port.py")
    lines = PORT.splitlines()

    def line(text: str) -> int:
        return next(number for number, content in enumerate(lines, 1) if text in content)

    assert [(item.kind, item.component, item.cpu, item.device, item.line) for item in found] == [
        ("kernel", "mlp_kernel", "", "nkilib.core.mlp.mlp.mlp", line("nkilib")),
        ("factory", "get_norm", "SlowNorm", "FastNorm", line("return SlowNorm")),
        ("factory", "get_rope", "PlainRope", "DeviceRope", line("if not config")),
        ("factory", "pick_norm", "A(size)", "B(size)", line("pick_norm(4)")),
        ("expression", "self.act", "PlainAct()", "KernelAct()", line("self.act")),
        ("assignment", "self.mlp", "PlainMLP(config)", "KernelMLP(config)", line('if "NXD')),
    ]
    by_name = {item.component: item for item in found}
    assert by_name["get_norm"].users == (line("get_norm()(4)"),)
    assert by_name["pick_norm"].defined_in == f"{tmp_path / 'deeper.py'}:5"
    assert by_name["mlp_kernel"].users == (line("return mlp_kernel"),)


def test_a_port_that_runs_the_same_classes_everywhere_has_an_empty_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "port.py").write_text("class Layer:\n    '''cpu_mode()'''\n    # if cpu_mode():\n    x = 1\n")
    out = tmp_path / "class_divergence_report.json"
    assert main(["port", "classes", str(file), "-o", str(out), "--json"]) == 0
    assert json.loads(out.read_text()) == json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text())["has_divergence"] is False


@needs_sources
def test_a_factory_of_the_library_is_followed_into_its_module(tmp_path: Path) -> None:
    package = find_environment().nxdi
    assert package is not None
    (file := tmp_path / "modeling_port.py").write_text(
        "from neuronx_distributed_inference.models.gpt_oss.modeling_gpt_oss import get_rmsnorm_cls\n\n"
        "norm = get_rmsnorm_cls()\n"
    )
    if package.version != "0.9.0":
        pytest.skip(f"the sources are NxD Inference {package.version}; the factory is that of 0.9.0")
    found = find_divergences(file)
    assert [(item.kind, item.component, item.line) for item in found] == [("factory", "get_rmsnorm_cls", 3)]
    assert "modeling_gpt_oss.py:" in found[0].defined_in
