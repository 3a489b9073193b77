"""The causes that a diagnosis can name; each has one entry in the knowledge base, of the same name with hyphens."""

from __future__ import annotations

CAUSES = frozenset(
    {
        "another_weight",
        "attention_scale",
        "attention_sinks",
        "attention_softcap",
        "causal_mask",
        "clipped_values",
        "different_weight",
        "doubled_all_reduce",
        "doubled_bias",
        "doubled_residual",
        "embedding_shard",
        "exchanged_projections",
        "expert_order",
        "feature_gain",
        "feature_offset",
        "feature_order",
        "gate_missing",
        "gate_up_swapped",
        "head_order",
        "inherited",
        "input_order",
        "kv_head_order",
        "lost_shard",
        "mask_hides_keys",
        "missing_all_reduce",
        "missing_bias",
        "missing_residual",
        "multiplier",
        "nonfinite",
        "norm_epsilon",
        "norm_gain_missing",
        "norm_kind",
        "norm_low_precision",
        "norm_missing",
        "norm_offset",
        "output_softcap",
        "over_precision",
        "overflow",
        "padding_mask",
        "position_offset",
        "quantised_weights",
        "residual_multiplier",
        "residual_sign",
        "rope_base",
        "rope_direction",
        "rope_late_scaling",
        "rope_layout",
        "rope_low_precision",
        "rope_missing",
        "rope_multiplier",
        "rope_partial",
        "rope_scaling_added",
        "rope_scaling_factor",
        "rope_scaling_ignored",
        "rope_scaling_kind",
        "routing_ignored",
        "routing_renormalised",
        "routing_rule",
        "routing_top_k",
        "routing_unnormalised",
        "same_shard_everywhere",
        "shape_mismatch",
        "sliding_window",
        "softmax_low_precision",
        "split_order",
        "stale_cache",
        "token_factor",
        "token_shift",
        "transposed_weight",
        "vocabulary_shards",
        "wrong_activation",
    }
)


def causes() -> tuple[str, ...]:
    """All causes by name."""
    return tuple(sorted(CAUSES))


def entry_of(cause: str) -> str:
    """Id of the entry that explains a cause; empty for `unknown`."""
    return cause.replace("_", "-") if cause in CAUSES else ""
