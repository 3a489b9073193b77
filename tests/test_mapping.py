"""Names of one implementation find their counterparts in another."""

from __future__ import annotations

import pytest
from tensorsleuth.analyze.interfaces import without_other_inputs
from tensorsleuth.analyze.mapping import map_by_name
from tensorsleuth.analyze.naming import canonical
from tensorsleuth.analyze.pairs import SiteMapping
from tensorsleuth.analyze.sites import Site, SiteInfo


def info(name: str, features: int = 8, *, order: int = 0, content: str = "", statistics_only: int = 0) -> SiteInfo:
    """A site written as `module`, `module[slot]`, `module:input` or `module:input[slot]`."""
    module, _, slot = name.removesuffix("]").partition("[")
    module, _, port = module.partition(":")
    site = Site(module, port or "output", slot)
    return SiteInfo(site, order, features, True, ("prefill",), content or name, 1, statistics_only)


def pairs(mapping: SiteMapping) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in mapping.pairs:
        found.setdefault(pair.reference.name, []).append(pair.target.name)
    return found


@pytest.mark.parametrize(
    ("module", "stripped"),
    [
        ("model.layers.0.mlp", "layers.0.mlp"),
        ("language_model.model.norm", "norm"),
        ("_orig_mod.model.embed_tokens", "embed_tokens"),
        ("layers.0.model_norm", "layers.0.model_norm"),
        ("model", ""),
        ("", ""),
    ],
)
def test_wrapping_prefixes_do_not_count(module: str, stripped: str) -> None:
    assert canonical(module) == stripped


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("model.layers.0.mlp", "layers.0.mlp[0]"),
        ("model.layers.0.self_attn[0]", "layers.0.self_attn[hidden_states]"),
        ("model.layers.3.self_attn.q_norm", "layers.3.self_attn.q_layernorm"),
        ("model.layers.3.self_attn.o_proj", "layers.3.self_attn.o_proj.o_proj"),
        ("model.layers.0.self_attn.k_proj", "layers.0.self_attn.qkv_proj[1]"),
        ("model.layers.0.self_attn.k_proj", "layers.0.self_attn.qkv_proj.k_proj"),
        ("model.layers.0.block_sparse_moe.gate", "layers.0.mlp.router.linear_router"),
        ("model.layers.0.mlp.gate", "layers.0.mlp.router.linear_router"),
        ("model.rotary_emb[1]", "layers.0.self_attn.rotary_emb[1]"),
        ("[logits]", "[0]"),
        ("lm_head", "lm_head"),
    ],
)
def test_known_counterparts_are_found(reference: str, target: str) -> None:
    mapping = map_by_name([info(reference)], [info(target)])
    assert len(mapping.pairs) == 1
    assert mapping.gaps == ()


def test_a_fused_projection_is_cut_by_the_widths_of_its_parts() -> None:
    reference = [
        info(f"model.layers.0.self_attn.{name}_proj", width) for name, width in (("q", 16), ("k", 4), ("v", 4))
    ]
    mapping = map_by_name(reference, [info("layers.0.self_attn.qkv_proj.Wqkv", 24)])
    assert [pair.columns for pair in mapping.pairs] == [((0, 16),), ((16, 20),), ((20, 24),)]
    assert {pair.transform for pair in mapping.pairs} == {"slice"}


def test_gate_and_up_are_found_in_their_fusion() -> None:
    reference = [info("model.layers.1.mlp.gate_proj", 6), info("model.layers.1.mlp.up_proj", 6)]
    mapping = map_by_name(reference, [info("layers.1.mlp.gate_up_proj", 12)])
    assert [pair.columns for pair in mapping.pairs] == [((0, 6),), ((6, 12),)]


def test_a_fusion_of_another_width_is_not_cut() -> None:
    mapping = map_by_name(
        [info("layers.0.mlp.gate_proj", 6), info("layers.0.mlp.up_proj", 6)], [info("layers.0.mlp.gate_up_proj", 11)]
    )
    assert mapping.pairs == ()
    assert {gap.status for gap in mapping.gaps} == {"unmatched"}


def test_every_module_that_computes_the_same_is_paired_in_its_order() -> None:
    target = [
        info("layers.0.self_attn.qkv_proj[0]", 16, order=5),
        info("layers.0.self_attn.qkv_proj.Wqkv", 24, order=4),
    ]
    reference = [
        info(f"model.layers.0.self_attn.{name}_proj", width) for name, width in (("q", 16), ("k", 4), ("v", 4))
    ]
    found = pairs(map_by_name(reference, target))
    assert found["model.layers.0.self_attn.q_proj"] == [
        "layers.0.self_attn.qkv_proj.Wqkv",
        "layers.0.self_attn.qkv_proj[0]",
    ]
    assert found["model.layers.0.self_attn.k_proj"] == ["layers.0.self_attn.qkv_proj.Wqkv"]


def test_a_container_that_returns_its_childs_values_is_no_hole() -> None:
    reference = [info("model.norm", content="same"), info("model[last_hidden_state]", content="same")]
    mapping = map_by_name(reference, [info("norm")])
    assert [(gap.status, gap.site.name) for gap in mapping.gaps] == [("skipped", "model[last_hidden_state]")]
    assert "model.norm" in mapping.gaps[0].reason


def test_hidden_states_are_never_taken_for_logits() -> None:
    mapping = map_by_name([info("model[last_hidden_state]")], [info("[logits]", 260)])
    assert mapping.pairs == ()


def test_a_site_without_a_counterpart_is_a_hole() -> None:
    mapping = map_by_name([info("model.layers.0.mlp")], [info("layers.1.mlp")])
    assert [(gap.status, gap.site.module) for gap in mapping.gaps] == [("unmatched", "model.layers.0.mlp")]


def test_another_shape_is_paired_so_that_the_mismatch_is_reported() -> None:
    mapping = map_by_name([info("model.norm", 8)], [info("norm", 9)])
    assert pairs(mapping) == {"model.norm": ["norm"]}


def test_filters_skip_with_a_reason() -> None:
    reference = [info("model.layers.0.mlp"), info("model.layers.0.self_attn")]
    target = [info("layers.0.mlp"), info("layers.0.self_attn")]
    only = map_by_name(reference, target, include=("*.mlp",))
    assert pairs(only) == {"model.layers.0.mlp": ["layers.0.mlp"]}
    without = map_by_name(reference, target, exclude=("*.mlp",))
    assert [(gap.status, gap.reason) for gap in without.gaps] == [("skipped", "excluded by the user")]


def test_statistics_only_sites_cannot_be_compared_and_say_so() -> None:
    mapping = map_by_name([info("norm")], [info("norm", statistics_only=1)])
    assert "statistics only" in mapping.gaps[0].reason


def test_an_input_of_another_width_is_another_thing_and_an_output_is_not() -> None:
    reference = [info("model.layers.0.attn:input[0]", 128), info("model.norm:input", 128), info("model.norm", 128)]
    target = [info("layers.0.attn:input[0]", 64), info("norm:input", 128), info("norm", 64)]
    mapping = without_other_inputs(map_by_name(reference, target), reference, target)
    assert pairs(mapping) == {"model.norm:input": ["norm:input"], "model.norm": ["norm"]}
    (gap,) = mapping.gaps
    assert (gap.site.name, gap.status) == ("model.layers.0.attn:input[0]", "skipped")
    assert "64 elements per position instead of 128" in gap.reason


def test_what_tells_a_rotary_embedding_its_dtype_is_not_compared_between_implementations() -> None:
    reference = [info("model.rotary_emb:input[0]"), info("model.rotary_emb[0]")]
    target = [info("layers.0.self_attn.rotary_emb:input[0]"), info("layers.0.self_attn.rotary_emb[0]")]
    found = without_other_inputs(map_by_name(reference, target), reference, target)
    assert pairs(found) == {"model.rotary_emb[0]": ["layers.0.self_attn.rotary_emb[0]"]}
    same = without_other_inputs(map_by_name(reference, reference), reference, reference)
    assert set(pairs(same)) == {"model.rotary_emb:input[0]", "model.rotary_emb[0]"}
