"""Generated ports: golden files, formatting, releases, what is and what is not in them."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from port_configurations import CONFIGURATIONS, configuration
from tensorsleuth.cli.app import main
from tensorsleuth.porting.generator.generate import generate, modeling_text, write_port
from tensorsleuth.porting.spec.architecture import Architecture
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.store import InputError

GOLDEN = Path(__file__).parent / "golden" / "ports"
GOLDENS = ("qwen3", "gemma2", "gpt_neox", "qwen2_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def specs() -> dict[str, Architecture]:
    """Architectures that between them use most blocks."""
    return {name: analyse_config(configuration(name)) for name in GOLDENS}


@pytest.mark.parametrize("name", GOLDENS)
def test_ports_are_as_reviewed(name: str, specs: dict[str, Architecture]) -> None:
    text = modeling_text(specs[name])
    file = GOLDEN / f"modeling_{name}.py"
    assert text == file.read_text(), f"the port changed: review it, then write it to {file}"


def test_the_same_model_gives_the_same_bytes(specs: dict[str, Architecture]) -> None:
    again = analyse_config(configuration("gemma2"))
    assert generate(again).files == generate(specs["gemma2"]).files


def test_ports_are_formatted_and_parse(tmp_path: Path, specs: dict[str, Architecture]) -> None:
    for name, spec in specs.items():
        file = write_port(generate(spec), tmp_path / name)
        ast.parse(file.read_text())
        command = [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "--line-length", "120", str(file)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_older_releases_take_the_scale_through_queries(specs: dict[str, Architecture]) -> None:
    newest, older = (modeling_text(specs["gemma2"], sdk) for sdk in ("2.29", None))
    assert "softmax_scale=config.query_pre_attn_scalar**0.5" in newest
    assert "softmax_scale" not in older
    assert "self.query_factor = config.query_pre_attn_scalar**-0.5 * self.head_dim**0.5" in older
    with pytest.raises(InputError, match=r"SDK '2\.20' is unknown; choose one of 2\.27, 2\.28, 2\.29"):
        modeling_text(specs["gemma2"], "2.20")


def test_a_port_holds_only_what_its_model_needs(specs: dict[str, Architecture]) -> None:
    text = modeling_text(specs["qwen3"])
    assert "NeuronLlamaMLP" in text
    for foreign in ("softcap", "local_mask", "rotate_interleaved", "RENAMED =", "split_", "LMHead", "try:", "logging"):
        assert foreign not in text


def test_norms_may_follow_the_rotary_embedding() -> None:
    found = analyse_config(configuration("hunyuan_v1_dense"))
    text = modeling_text(found)
    assert "return self.q_norm(Q), self.k_norm(K), cos_cache, sin_cache" in text
    assert "q_layernorm=" not in text
    norm = found.attention.query_key_norm
    assert norm is not None
    wide = dataclasses.replace(found.attention, query_key_norm=dataclasses.replace(norm, scope="width"))
    with pytest.raises(InputError, match="unsupported: norms of rotated queries and keys over several heads"):
        modeling_text(dataclasses.replace(found, attention=wide))


def test_generate_writes_the_port_and_its_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    configuration("gpt2").save_pretrained(model)
    assert main(["port", "generate", str(model), "-o", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "neuron_port"
    assert sorted(path.name for path in folder.iterdir()) == ["architecture.json", "modeling_gpt2.py"]
    assert "NeuronGPT2ForCausalLM" in capsys.readouterr().out


def test_every_configuration_is_distinct() -> None:
    texts = {name: str(configuration(name).to_diff_dict()) for name in CONFIGURATIONS}
    assert len(set(texts.values())) == len(texts)
