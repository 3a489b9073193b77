"""What the analysis finds in models of transformers, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from port_configurations import configuration
from safetensors.torch import save_file
from tensorsleuth.cli.app import main
from tensorsleuth.porting.spec.architecture import Architecture
from tensorsleuth.porting.spec.document import from_json, json_schema, leaves, origin_of, to_json
from tensorsleuth.porting.spec.evaluation import evaluate
from tensorsleuth.porting.spec.expressions import visible
from tensorsleuth.porting.spec.extract import analyse_config, analyse_model
from tensorsleuth.porting.spec.rotary import find_rotation, frequencies
from tensorsleuth.porting.spec.wiring import explain
from tensorsleuth.store import InputError
from transformers import BloomConfig, LlamaConfig, MambaConfig, PretrainedConfig


@pytest.fixture(scope="module")
def gemma2() -> Architecture:
    """Gemma 2: four norms with an offset, softcaps, alternating windows, a scaled embedding."""
    return analyse_config(configuration("gemma2"))


def test_gemma2_is_understood(gemma2: Architecture) -> None:
    assert gemma2.layer.placement == "pre+post"
    assert gemma2.layer.residual == "sequential"
    assert gemma2.head.norm.offset == 1.0
    assert gemma2.attention.softcap is not None
    assert gemma2.attention.softcap.expression == "config.attn_logit_softcapping"
    assert gemma2.attention.scale.expression == "config.query_pre_attn_scalar ** -0.5"
    assert [(case.condition, case.kind) for case in gemma2.attention.mask] == [
        ('config.layer_types[layer_idx] == "sliding_attention"', "window"),
        ("", "causal"),
    ]
    assert gemma2.embedding.factor is not None
    assert gemma2.embedding.factor.expression == "config.hidden_size ** 0.5"
    assert gemma2.head.softcap is not None
    assert gemma2.head.tied


def test_a_parallel_residual_shares_one_norm() -> None:
    found = analyse_config(configuration("cohere2"))
    assert found.layer.residual == "parallel"
    assert [named.name for named in found.layer.norms] == ["input_layernorm"]
    assert [(case.condition, case.rotary and case.rotary.layout) for case in found.attention.rotary] == [
        ('config.layer_types[layer_idx] == "sliding_attention"', "interleaved"),
        ("", None),
    ]


def test_fused_projections_are_told_apart_by_values() -> None:
    assert analyse_config(configuration("gpt2")).attention.layout == "plain"
    assert analyse_config(configuration("gpt_neox")).attention.layout == "grouped"
    assert analyse_config(configuration("glm")).feed_forward[0].block.layout == "gate_first"


def test_learned_positions_come_with_their_offset() -> None:
    positions = analyse_config(configuration("opt")).embedding.positions
    assert positions is not None
    assert (positions.offset, positions.rows.expression) == (2, "config.max_position_embeddings + 2")


@pytest.mark.parametrize("name", ["opt", "granite", "deepseek_v3"])
def test_every_fact_has_a_source(name: str) -> None:
    found = analyse_config(configuration(name))
    assert [field for field, _ in leaves(found) if not origin_of(found, field)] == []
    factors = {field: origin_of(found, field) for field, value in leaves(found) if "config." in str(value)}
    assert all("config: " in origin for origin in factors.values()), factors


def test_a_line_of_transformers_is_really_the_one(gemma2: Architecture) -> None:
    import transformers

    node = next(node for node in gemma2.layer.nodes if node.name == "pre_feedforward_layernorm")
    file, _, line = node.source.partition(":")
    text = (Path(transformers.__file__).parent.parent / file).read_text().splitlines()[int(line) - 1]
    assert "self.pre_feedforward_layernorm(" in text


def test_the_document_reads_back_and_fits_its_schema(gemma2: Architecture) -> None:
    assert from_json(to_json(gemma2)) == gemma2
    assert to_json(gemma2) == to_json(analyse_config(configuration("gemma2")))
    schema = json_schema()
    document = json.loads(to_json(gemma2))
    assert set(document) == set(schema["$defs"]["Architecture"]["required"])
    with pytest.raises(InputError, match="version 99"):
        from_json(json.dumps({**document, "version": 99}))
    with pytest.raises(InputError, match="no surprise"):
        from_json(json.dumps({**document, "surprise": 1}))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(hidden_size=64, n_layer=2, n_head=4), r"unsupported: .*Bloom"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2), r"unsupported: .*Mamba|attention"),
    ],
)
def test_what_is_not_understood_is_refused(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        analyse_config(config)


def test_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).save_pretrained(tmp_path)
    analyse_model(tmp_path)
    save_file({"model.layers.0.self_attn.gate.weight": torch.zeros(4)}, tmp_path / "extra.safetensors")
    with pytest.raises(InputError, match=r"unsupported: checkpoint weight model\.layers\.0\.self_attn\.gate\.weight"):
        analyse_model(tmp_path)
    assert main(["port", "analyze", str(tmp_path)]) == 2


def test_analyze_prints_facts_with_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration("qwen3").save_pretrained(tmp_path)
    assert main(["port", "analyze", str(tmp_path), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["attention"]["query_key_norm"]["scope"] == "head"
    assert main(["port", "analyze", str(tmp_path)]) == 0
    assert "modeling_qwen3.py:" in capsys.readouterr().out


@given(st.lists(st.sampled_from([0.0, 1.0, -0.5, 0.22, 3.0]), min_size=3, max_size=3))
def test_sums_are_read_off_values(factors: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    known = {name: torch.randn(3, 5, 7, generator=generator) for name in "abc"}
    total = sum(factor * value for factor, value in zip(factors, known.values(), strict=True))
    assert isinstance(total, torch.Tensor)
    if not any(factors):
        return
    found = explain(total, known)
    assert found is not None
    expected = {name: factor for name, factor in zip("abc", factors, strict=True) if factor}
    assert {s.name: s.factor for s in found} == pytest.approx(expected, rel=1e-5)
    assert explain(total * torch.randn(3, 5, 7, generator=generator), known) is None


@given(st.sampled_from(["half", "interleaved"]), st.sampled_from([8, 16, 24]), st.integers(0, 50))
def test_rotations_are_read_off_values(layout: str, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(2, 3, 17, 24, generator=generator)
    rates, _ = frequencies("default", 10000.0, dim, None, None, None) or (torch.empty(0), 1.0)
    angles = torch.arange(17)[:, None] * rates.float()
    cos, sin = angles.cos(), angles.sin()
    pairs = (slice(0, dim // 2), slice(dim // 2, dim)) if layout == "half" else (slice(0, dim, 2), slice(1, dim, 2))
    a, b = (before[..., part] for part in pairs)
    after = before.clone()
    after[..., pairs[0]], after[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
    found = find_rotation(before, after)
    assert found is not None
    assert (found.layout, found.dim) == (layout, dim)
    assert find_rotation(before, torch.randn(2, 3, 17, 24, generator=generator)) is None


@pytest.mark.parametrize(
    "expression",
    [
        "().__class__.__bases__[0].__subclasses__()",
        "config.scale.__class__",
        "config.scale.real",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "__import__('os')",
        "math.log",
        "config.scale if True else 1",
        "1; 2",
    ],
)
def test_an_expression_can_do_nothing_but_compute(expression: str) -> None:
    with pytest.raises(InputError, match="unsupported: "):
        evaluate(expression, {"config": SimpleNamespace(scale=2)})


def test_an_expression_computes_as_python_does() -> None:
    config = SimpleNamespace(size=96, heads=4, kinds=["a", "b"], scaling={"factor": 4.0})
    found = {
        "config.size // config.heads": 24,
        "config.size ** -0.5": 96**-0.5,
        "int(config.size * 0.3)": 28,
        '0.1 * math.log(config.scaling["factor"]) + 1': 0.1 * math.log(4.0) + 1,
        "(layer_idx + 1) % 2 == 0": True,
        'config.kinds[layer_idx] == "b"': True,
        "not layer_idx in config.kinds": True,
        "-layer_idx < 0": True,
    }
    assert {text: evaluate(text, {"config": config, "layer_idx": 1}) for text in found} == found


def test_a_key_that_is_code_stays_out_of_the_port() -> None:
    hostile = "x if __import__('os').abort() else config.hidden_size"
    config = LlamaConfig(**{hostile: 0.125, "class": 0.25, "_private": 0.5})
    assert hasattr(config, hostile)
    seen = vars(visible(config))
    assert hostile not in seen
    assert not {"class", "_private"} & set(seen)
    assert seen["hidden_size"] == config.hidden_size


def test_a_correction_may_lie_beside_the_router_and_experts_may_begin_late() -> None:
    found = analyse_config(configuration("ernie4_5_moe"))
    dense, sparse = found.feed_forward
    assert sparse.experts is not None
    router = sparse.experts.router
    assert (router.scores, router.normalized) == ("softmax", True)
    assert (router.correction_module, router.correction) == ("moe_statics", "e_score_correction_bias")
    names = {"moe_layer_start_index": 2, "moe_layer_end_index": 6, "moe_layer_interval": 2}
    kinds = [evaluate(dense.condition, {"config": SimpleNamespace(**names), "layer_idx": layer}) for layer in range(9)]
    assert [bool(kind) for kind in kinds] == [not ((n + 1) % 2 == 0 and 2 <= n <= 6) for n in range(9)]
