"""NxD Inference's names and layouts against transformers', as both libraries show them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tensorsleuth.analyze.mapping import map_by_name
from tensorsleuth.analyze.pairs import SiteMapping
from test_mapping import info, pairs

HIDDEN, HEADS, KV = 128, 128, 64
LAYER, NXDI_LAYER = "model.layers.1", "layers.1"


def both(reference: dict[str, int], target: dict[str, int]) -> SiteMapping:
    """Map sites given as name: features."""
    sides = [[info(name, width, order=place) for place, (name, width) in enumerate(side.items())]
             for side in (reference, target)]  # fmt: skip
    return map_by_name(*sides)


DENSE = {
    "model.embed_tokens": HIDDEN, "model.rotary_emb[0]": 16, "model.rotary_emb[1]": 16,
    f"{LAYER}.input_layernorm": HIDDEN, f"{LAYER}.self_attn.q_proj": HEADS, f"{LAYER}.self_attn.k_proj": KV,
    f"{LAYER}.self_attn.v_proj": KV, f"{LAYER}.self_attn.q_norm": HEADS, f"{LAYER}.self_attn.k_norm": KV,
    f"{LAYER}.self_attn.o_proj": HIDDEN, f"{LAYER}.self_attn[0]": HIDDEN, f"{LAYER}.post_attention_layernorm": HIDDEN,
    f"{LAYER}.mlp.gate_proj": 256, f"{LAYER}.mlp.up_proj": 256, f"{LAYER}.mlp.act_fn": 256,
    f"{LAYER}.mlp.down_proj": HIDDEN, f"{LAYER}.mlp": HIDDEN, LAYER: HIDDEN, "model.norm": HIDDEN, "lm_head": 512,
    "[logits]": 512,
}  # fmt: skip
NXDI_DENSE = {
    "embed_tokens": HIDDEN, f"{NXDI_LAYER}.input_layernorm": HIDDEN, "layers.0.self_attn.rotary_emb[0]": 16,
    "layers.0.self_attn.rotary_emb[1]": 16, f"{NXDI_LAYER}.self_attn.qkv_proj.q_proj": HEADS,
    f"{NXDI_LAYER}.self_attn.qkv_proj.k_proj": KV, f"{NXDI_LAYER}.self_attn.qkv_proj.v_proj": KV,
    f"{NXDI_LAYER}.self_attn.qkv_proj[0]": HEADS, f"{NXDI_LAYER}.self_attn.qkv_proj[1]": KV,
    f"{NXDI_LAYER}.self_attn.qkv_proj[2]": KV, f"{NXDI_LAYER}.self_attn.q_layernorm": HEADS,
    f"{NXDI_LAYER}.self_attn.k_layernorm": KV, f"{NXDI_LAYER}.self_attn.o_proj.o_proj": HIDDEN,
    f"{NXDI_LAYER}.self_attn.o_proj": HIDDEN, f"{NXDI_LAYER}.self_attn[hidden_states]": HIDDEN,
    f"{NXDI_LAYER}.self_attn[present_key_value.0]": KV, f"{NXDI_LAYER}.self_attn[present_key_value.1]": KV,
    f"{NXDI_LAYER}.self_attn[cos_cache]": 16, f"{NXDI_LAYER}.post_attention_layernorm": HIDDEN,
    f"{NXDI_LAYER}.mlp.gate_proj": 256, f"{NXDI_LAYER}.mlp.up_proj": 256, f"{NXDI_LAYER}.mlp.act_fn": 256,
    f"{NXDI_LAYER}.mlp.down_proj": HIDDEN, f"{NXDI_LAYER}.mlp[0]": HIDDEN, f"{NXDI_LAYER}[0]": HIDDEN,
    f"{NXDI_LAYER}[1.0]": KV, f"{NXDI_LAYER}[1.1]": KV, f"{NXDI_LAYER}[2]": 16, "norm": HIDDEN, "lm_head": 512,
    "[0]": 512, "[1]": KV, "[2]": KV, "[3]": KV, "[4]": KV,
}  # fmt: skip


def test_every_site_of_a_dense_model_has_its_counterparts() -> None:
    mapping = both(DENSE, NXDI_DENSE)
    assert mapping.gaps == ()
    attention = f"{NXDI_LAYER}.self_attn"
    assert pairs(mapping) == {
        "model.embed_tokens": ["embed_tokens"],
        "model.rotary_emb[0]": ["layers.0.self_attn.rotary_emb[0]"],
        "model.rotary_emb[1]": ["layers.0.self_attn.rotary_emb[1]"],
        f"{LAYER}.input_layernorm": [f"{NXDI_LAYER}.input_layernorm"],
        f"{LAYER}.self_attn.q_proj": [f"{attention}.qkv_proj.q_proj", f"{attention}.qkv_proj[0]"],
        f"{LAYER}.self_attn.k_proj": [f"{attention}.qkv_proj.k_proj", f"{attention}.qkv_proj[1]"],
        f"{LAYER}.self_attn.v_proj": [
            f"{attention}.qkv_proj.v_proj", f"{attention}.qkv_proj[2]", f"{attention}[present_key_value.1]",
            f"{NXDI_LAYER}[1.1]", "(root)[4]",
        ],
        f"{LAYER}.self_attn.q_norm": [f"{attention}.q_layernorm"],
        f"{LAYER}.self_attn.k_norm": [f"{attention}.k_layernorm"],
        f"{LAYER}.self_attn.o_proj": [f"{attention}.o_proj.o_proj", f"{attention}.o_proj"],
        f"{LAYER}.self_attn[0]": [f"{attention}[hidden_states]"],
        f"{LAYER}.post_attention_layernorm": [f"{NXDI_LAYER}.post_attention_layernorm"],
        f"{LAYER}.mlp.gate_proj": [f"{NXDI_LAYER}.mlp.gate_proj"],
        f"{LAYER}.mlp.up_proj": [f"{NXDI_LAYER}.mlp.up_proj"],
        f"{LAYER}.mlp.act_fn": [f"{NXDI_LAYER}.mlp.act_fn"],
        f"{LAYER}.mlp.down_proj": [f"{NXDI_LAYER}.mlp.down_proj"],
        f"{LAYER}.mlp": [f"{NXDI_LAYER}.mlp[0]"],
        LAYER: [f"{NXDI_LAYER}[0]"],
        "model.norm": ["norm"],
        "lm_head": ["lm_head"],
        "(root)[logits]": ["(root)[0]"],
    }  # fmt: skip


MOE = f"{NXDI_LAYER}.mlp"
NXDI_MOE = {
    f"{MOE}.router.linear_router": 4, f"{MOE}.router[0]": 4, f"{MOE}.router[1]": 4, f"{MOE}.router[2]": 2,
    f"{MOE}.expert_mlps.mlp_op": 512, f"{MOE}.expert_mlps": HIDDEN, f"{MOE}[0]": HIDDEN,
}  # fmt: skip
LOGITS = [f"{MOE}.router.linear_router", f"{MOE}.router[0]"]
OUTPUT = [f"{MOE}.expert_mlps", f"{MOE}[0]"]


@pytest.mark.parametrize("block", ["block_sparse_moe", "mlp"])
def test_a_mixture_of_experts(block: str) -> None:
    name = f"{LAYER}.{block}"
    experts = {f"{name}.experts.{e}.{part}": HIDDEN for e in range(2) for part in ("w1", "act_fn", "w2")}
    mapping = both({f"{name}.gate": 4, **experts, f"{name}[0]": HIDDEN, f"{name}[1]": 4}, NXDI_MOE)
    assert pairs(mapping) == {f"{name}.gate": LOGITS, f"{name}[0]": OUTPUT, f"{name}[1]": LOGITS}
    assert {gap.status for gap in mapping.gaps} == {"skipped"}
    assert {gap.site.name for gap in mapping.gaps} == set(experts)
    assert "computes all experts in layers.1.mlp.expert_mlps" in mapping.gaps[0].reason


def test_a_gate_that_returns_its_choice_too() -> None:
    """transformers 5: (logits, weights of the chosen, their indices)."""
    name = f"{LAYER}.mlp"
    gate = {f"{name}.gate[0]": 4, f"{name}.gate[1]": 2, f"{name}.gate[2]": 2}
    mapping = both({**gate, f"{name}.experts": HIDDEN, name: HIDDEN}, NXDI_MOE)
    assert pairs(mapping) == {
        f"{name}.gate[0]": LOGITS, f"{name}.gate[2]": [f"{MOE}.router[2]"], f"{name}.experts": OUTPUT[:1], name: OUTPUT,
    }  # fmt: skip
    assert [(gap.site.slot, gap.status) for gap in mapping.gaps] == [("1", "skipped")]


FORWARD = f"{NXDI_LAYER}.feed_forward"
NXDI_GPT_OSS = {
    "layers.0.self_attn.rotary_emb[0]": 16, "layers.1.self_attn.rotary_emb[0]": 16,
    f"{NXDI_LAYER}.self_attn[hidden_states]": HIDDEN, f"{FORWARD}.moe.router.linear_router": 4,
    f"{FORWARD}.moe.router[0]": 4, f"{FORWARD}.moe.router[1]": 4, f"{FORWARD}.moe.router[2]": 2,
    f"{FORWARD}.moe.expert_mlps": HIDDEN, f"{FORWARD}.moe[0]": HIDDEN, f"{FORWARD}[0]": HIDDEN,
}  # fmt: skip


def test_gpt_oss_returns_affinities_and_half_the_angles() -> None:
    name = f"{LAYER}.mlp"
    reference = {
        "model.rotary_emb[0]": 8, f"{LAYER}.self_attn[0]": HIDDEN, f"{LAYER}.self_attn[1]": 99,
        f"{name}.router[0]": 4, f"{name}.router[1]": 2, f"{name}.experts": HIDDEN,
        f"{name}[0]": HIDDEN, f"{name}[1]": 4,
    }  # fmt: skip
    mapping = both(reference, NXDI_GPT_OSS)
    outputs = [f"{FORWARD}.moe.expert_mlps", f"{FORWARD}.moe[0]", f"{FORWARD}[0]"]
    assert pairs(mapping) == {
        "model.rotary_emb[0]": ["layers.0.self_attn.rotary_emb[0]", "layers.1.self_attn.rotary_emb[0]"],
        f"{LAYER}.self_attn[0]": [f"{NXDI_LAYER}.self_attn[hidden_states]"],
        f"{name}.router[0]": [f"{FORWARD}.moe.router[1]"],
        f"{name}.router[1]": [f"{FORWARD}.moe.router[2]"],
        f"{name}.experts": outputs[:1],
        f"{name}[0]": outputs,
        f"{name}[1]": [f"{FORWARD}.moe.router[1]"],
    }
    assert {pair.columns for pair in mapping.pairs if "rotary" in pair.reference.name} == {((0, 8),)}
    assert [(gap.site.name, gap.reason) for gap in mapping.gaps] == [
        (f"{LAYER}.self_attn[1]", "attention weights, which the target does not return; --scores records them")
    ]
    tapped = both(reference, {**NXDI_GPT_OSS, f"{NXDI_LAYER}.self_attn:tap[weights]": 99})
    assert pairs(tapped)[f"{LAYER}.self_attn[1]"] == [f"{NXDI_LAYER}.self_attn:tap[weights]"]
    assert not tapped.gaps


def test_what_lies_within_a_block_of_experts_is_accounted_for() -> None:
    block, fused = f"{LAYER}.mlp", f"{NXDI_LAYER}.mlp.moe.expert_mlps"
    reference = {f"{block}.activation": 24, f"{block}.moe_statics": 4, f"{block}.other": 5}
    gaps = {gap.site.name: (gap.status, gap.reason) for gap in both(reference, {fused: HIDDEN}).gaps}
    assert gaps[f"{block}.activation"] == (
        "skipped", f"sees the rows that the router grouped by expert; the target computes all experts in {fused}"
    )  # fmt: skip
    assert gaps[f"{block}.moe_statics"][0] == "skipped"
    assert gaps[f"{block}.other"][0] == "unmatched"
    assert {gap.status for gap in both(reference, {f"{NXDI_LAYER}.mlp": HIDDEN}).gaps} == {"unmatched"}


def test_a_router_of_the_same_implementation_keeps_its_names() -> None:
    sites = {f"{LAYER}.mlp.router[0]": 4, f"{LAYER}.mlp.router[1]": 2}
    assert pairs(both(sites, sites)) == {name: [name] for name in sites}


@pytest.mark.parametrize(
    ("shards", "features", "expected"),
    [
        (1, 24, [((0, 16),), ((16, 20),), ((20, 24),)]),
        (2, 24, [((0, 8), (12, 20)), ((8, 10), (20, 22)), ((10, 12), (22, 24))]),
        (4, 32, [((0, 4), (8, 12), (16, 20), (24, 28)), ((4, 6), (20, 22)), ((6, 8), (22, 24))]),
    ],
)
def test_a_projection_fused_on_every_rank_is_cut_rank_by_rank(
    shards: int, features: int, expected: list[tuple[tuple[int, int], ...]]
) -> None:
    """Four ranks and two KV heads: each head lives on two ranks."""
    reference = [info(f"{LAYER}.self_attn.{n}_proj", width) for n, width in (("q", 16), ("k", 4), ("v", 4))]
    fused = replace(info(f"{NXDI_LAYER}.self_attn.qkv_proj.Wqkv", features), shards=shards)
    assert [pair.columns for pair in map_by_name(reference, [fused]).pairs] == expected


def test_a_fused_reference_is_compared_part_by_part() -> None:
    target = {f"{NXDI_LAYER}.self_attn.{n}_proj": width for n, width in (("q", 16), ("k", 4), ("v", 4))}
    mapping = both({f"{LAYER}.self_attn.qkv_proj": 24}, target)
    assert [(pair.target.name, pair.transform, pair.reference_columns) for pair in mapping.pairs] == [
        (f"{NXDI_LAYER}.self_attn.q_proj", "part", ((0, 16),)),
        (f"{NXDI_LAYER}.self_attn.k_proj", "part", ((16, 20),)),
        (f"{NXDI_LAYER}.self_attn.v_proj", "part", ((20, 24),)),
    ]


def test_two_models_in_one_target_are_not_guessed_between() -> None:
    target = [info("model.norm", content="a"), info("module.norm", content="b")]
    mapping = map_by_name([info("transformer.norm")], target)
    assert mapping.pairs == ()
    assert [site.name for site in mapping.ambiguous[0].candidates] == ["model.norm", "module.norm"]
    assert "model.norm, module.norm" in mapping.gaps[0].reason
    assert pairs(map_by_name([info("model.norm")], target)) == {"model.norm": ["model.norm"]}
