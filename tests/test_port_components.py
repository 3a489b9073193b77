"""What the generator knows of the correspondence of a port's modules, where names and values do not tell."""

from __future__ import annotations

from typing import Any

from port_configurations import configuration
from tensorsleuth.porting.parity.components import Sizes, component_mapping, sizes_of
from tensorsleuth.porting.parity.first_modules import shows_at
from tensorsleuth.porting.parity.gate import held_to_logits
from tensorsleuth.porting.parity.mutation import mutants
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.porting.spec.hostile import hostile_model, small_config

_SIZES = Sizes(n_layers=1, heads=6, kv_heads=3, head_dim=8, vocabulary=131, tp=2)


def _entries(name: str, sizes: Sizes, *sites: str) -> dict[str, tuple[list[str], dict[str, Any] | None]]:
    """Targets and ranges of these sites of a reference (the model is `(root)`)."""
    recorded = {
        (module.removeprefix("(root)"), slot.rstrip("]")) for module, _, slot in (s.partition("[") for s in sites)
    }
    document = component_mapping(analyse_config(configuration(name)), sizes, recorded)
    pairs = zip(document["component_mapping"], document["transforms"], strict=True)
    return {source: (targets, ranges) for ([source], targets), ranges in pairs}


def test_copies_of_kv_heads_and_padding_of_logits_are_left_out() -> None:
    attention = "model.layers.0.self_attn"
    names = ("k_proj", "v_proj", "k_norm", "q_norm")
    sites = [*(f"{attention}.{name}" for name in names), "lm_head", "(root)[logits]"]
    found = _entries("qwen3", _SIZES, *sites)
    copies = {"target": [[0, 8], [16, 24], [32, 40]]}
    assert {name.rpartition(".")[2]: entry for name, entry in found.items()} == {
        "k_proj": (["layers.0.self_attn.qkv_proj.k_proj"], copies),
        "v_proj": (["layers.0.self_attn.qkv_proj.v_proj"], copies),
        "k_norm": (["layers.0.self_attn.k_layernorm"], copies),
        "lm_head": (["lm_head"], {"target": [[0, 131]]}),
        "(root)[logits]": (["(root)[0]"], {"target": [[0, 131]]}),
    }
    whole = Sizes(n_layers=1, heads=6, kv_heads=2, head_dim=8, vocabulary=130, tp=2)
    assert _entries("qwen3", whole, *sites) == {}


def test_tables_of_several_or_interleaved_rotary_embeddings_are_no_modules_to_compare() -> None:
    sites = ("model.rotary_emb[0]", "model.rotary_emb[1]", "model.rotary_emb_local[0]", "model.norm")
    found = _entries("gemma3", _SIZES, *sites)
    assert {name: targets for name, (targets, _) in found.items()} == {
        **{site: [] for site in sites[:-1]},
        "model.norm": ["norm"],
    }
    assert _entries("qwen3", _SIZES, *sites[:2]) == {}
    assert [targets for targets, _ in _entries("cohere", _SIZES, *sites[:2]).values()] == [[], []]
    assert [targets for targets, _ in _entries("deepseek_v2", _SIZES, "model.rotary_emb").values()] == [[]]


def test_sizes_are_those_of_the_model_that_runs() -> None:
    config = configuration("qwen3")
    small = small_config(config)
    found = sizes_of(analyse_config(config), small, tp=2)
    assert found.vocabulary == small.vocab_size
    assert found.repeats == small.num_attention_heads // small.num_key_value_heads


def test_a_wrong_fact_shows_first_where_it_acts() -> None:
    gemma2, deepseek = (analyse_config(configuration(name)) for name in ("gemma2", "deepseek_v3"))
    layer = "model.layers.3"
    for spec, field, first, later in (
        (gemma2, "embedding.factor", f"{layer}.input_layernorm", f"{layer}.self_attn.q_proj"),
        (gemma2, "layer.norms.input_layernorm.norm.eps", f"{layer}.input_layernorm", f"{layer}.self_attn.o_proj"),
        (gemma2, "layer.output.1", layer, f"{layer}.mlp"),
        (gemma2, "attention.softcap", f"{layer}.self_attn.o_proj", f"{layer}.self_attn.q_proj"),
        (gemma2, "attention.rotary.0.rotary.theta", "model.rotary_emb", f"{layer}.mlp"),
        (gemma2, "attention.rotary.0.rotary.layout", f"{layer}.self_attn.o_proj", "model.rotary_emb"),
        (gemma2, "feed_forward.0.block.activation_name", f"{layer}.mlp.act_fn", f"{layer}.mlp.gate_proj"),
        (gemma2, "head.softcap", "(root)", "model.norm"),
        (deepseek, "attention.latent.norm.eps", f"{layer}.self_attn.kv_a_layernorm", f"{layer}.self_attn.kv_b_proj"),
        (deepseek, "feed_forward.1.experts.router.scores", f"{layer}.mlp.gate", layer),
        (deepseek, "feed_forward.1.experts.shared.block.activation_name", f"{layer}.mlp.shared_experts", "model.norm"),
    ):
        assert shows_at(spec, field, first), field
        assert not shows_at(spec, field, later), field


def test_every_mutant_shows_at_some_module_of_its_model() -> None:
    for name in ("opt", "gpt_neox", "stablelm-norms", "mixtral"):
        config = configuration(name)
        spec, modules = analyse_config(config), [path for path, _ in hostile_model(config).named_modules()]
        for mutant in mutants(spec):
            assert any(shows_at(spec, mutant.field, module or "(root)") for module in modules), mutant.field


def test_replicates_do_not_excuse_logits() -> None:
    assert held_to_logits("pass", (), None) == ("pass", ())
    assert held_to_logits("pass", (), 1.19) == ("pass", ())
    verdict, (reason,) = held_to_logits("pass", (), 1.2)
    assert verdict == "undecided"
    assert "R of the logits is 1.20, not below 1.2" in reason
    assert held_to_logits("fail", ("why",), 3.0) == ("fail", ("why",))
