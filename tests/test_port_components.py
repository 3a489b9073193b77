"""What the generator knows of the correspondence of a port's modules, where names and values do not tell."""

from __future__ import annotations

from typing import Any

from port_configurations import configuration
from tensorsleuth.porting.parity.components import Sizes, component_mapping, sizes_of
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.porting.spec.hostile import small_config

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


def test_tables_of_several_rotary_embeddings_are_no_modules_to_compare() -> None:
    sites = ("model.rotary_emb[0]", "model.rotary_emb[1]", "model.rotary_emb_local[0]", "model.norm")
    found = _entries("gemma3", _SIZES, *sites)
    assert {name: targets for name, (targets, _) in found.items()} == {
        **{site: [] for site in sites[:-1]},
        "model.norm": ["norm"],
    }
    assert _entries("qwen3", _SIZES, *sites[:2]) == {}


def test_sizes_are_those_of_the_model_that_runs() -> None:
    config = configuration("qwen3")
    small = small_config(config)
    found = sizes_of(analyse_config(config), small, tp=2)
    assert found.vocabulary == small.vocab_size
    assert found.repeats == small.num_attention_heads // small.num_key_value_heads
