"""Ports against their models: logits of every architecture, and the gate with a port that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from port_configurations import configuration
from tensorsleuth.porting.generator.generate import generate, modeling_text, write_port
from tensorsleuth.porting.parity.gate import QUICK, check_port
from tensorsleuth.porting.parity.mutation import mutants
from tensorsleuth.porting.spec.architecture import Architecture, Number
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.store import InputError

pytestmark = pytest.mark.skipif(
    not (os.environ.get("NXDI_SRC") and os.environ.get("NXD_SRC")),
    reason="needs the NxD Inference sources: set NXDI_SRC and NXD_SRC to checkouts of them",
)
WORKER = Path(__file__).with_name("port_worker.py")
#: Between them they use every block; benchmarks/ports.py runs all configurations through the whole gate.
TESTED = (
    "llama",
    "phi3",
    "gemma3",
    "gpt_neox",
    "gpt2",
    "opt",
    "stablelm-norms",
    "olmo2",
    "cohere2",
    "phimoe",
    "gpt_oss-mxfp4",
    "deepseek_v3-fp8",
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Relative L2 distance of logits at prefill and decode, by architecture."""
    folder = tmp_path_factory.mktemp("ports")
    command = [sys.executable, str(WORKER), str(folder), *TESTED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", TESTED)
def test_a_port_computes_its_models_logits(name: str, errors: dict[str, list[float]]) -> None:
    prefill, decode = errors[name]
    assert prefill < 1e-5
    assert decode < 1e-5


def test_mutants_differ_in_one_fact_that_the_port_shows() -> None:
    architecture = analyse_config(configuration("qwen3"))
    right = modeling_text(architecture)
    found = {mutant.field: mutant for mutant in mutants(architecture)}
    assert {
        "attention.scale",
        "attention.rotary.0.rotary.theta",
        "attention.rotary.0.rotary.layout",
        "attention.query_key_norm.norm.eps",
        "layer.norms.input_layernorm.norm.kind",
        "layer.nodes.post_attention_layernorm.terms.0",
        "feed_forward.0.block.activation_name",
    } <= found.keys()
    assert all(_text_or_refusal(mutant.spec) != right for mutant in found.values())


def _text_or_refusal(architecture: Architecture) -> str:
    try:
        return modeling_text(architecture)
    except InputError as error:
        return str(error)


def test_the_gate_names_the_first_divergent_module(tmp_path: Path) -> None:
    config = configuration("qwen3")
    architecture = analyse_config(config)
    scale = architecture.attention.scale
    wrong = dataclasses.replace(scale, expression=f"1.1 * {scale.expression}")
    attention = dataclasses.replace(architecture.attention, scale=Number(wrong.expression, 1.1 * scale.value))
    port = generate(dataclasses.replace(architecture, attention=attention))
    file = write_port(port, tmp_path)
    (check,), _ = check_port(architecture, config, f"{file}:{port.class_name}", tmp_path, QUICK)
    assert check.verdict == "fail"
    assert check.first_divergent == "model.layers.0.self_attn.o_proj (prefill)"
