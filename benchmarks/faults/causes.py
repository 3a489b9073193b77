"""What a diagnosis may call each planted cause, and its class in the published table of magnitudes."""

from __future__ import annotations

#: By the benchmark's own words for a cause: names that a diagnosis may use. More than one where several are true: an
#: all-reduce that is done twice on two ranks is a factor of two, and a run that does not know of ranks shows no more.
_NAMES = {
    "attention scale": "attention_scale",
    "softmax precision": "softmax_low_precision",
    "attention softcap": "attention_softcap",
    "sinks": "attention_sinks",
    "kv repeat": "kv_head_order",
    "head order": "head_order input_order",
    "rope layout": "rope_layout",
    "rope partial": "rope_partial",
    "rope base": "rope_base",
    "rope scaling": "rope_scaling_ignored",
    "rope factor": "rope_multiplier",
    "rope precision": "rope_low_precision rope_late_scaling",
    "rope position": "position_offset",
    "causal mask": "causal_mask",
    "sliding window": "sliding_window",
    "padding mask": "padding_mask",
    "decode mask": "mask_hides_keys",
    "kv cache": "stale_cache",
    "clipping": "clipped_values",
    "embedding multiplier": "multiplier",
    "embedding shard": "embedding_shard missing_all_reduce lost_shard",
    "logits multiplier": "multiplier",
    "multiplier": "multiplier",
    "logits softcap": "output_softcap",
    "vocabulary order": "vocabulary_shards",
    "norm epsilon": "norm_epsilon",
    "norm precision": "norm_low_precision",
    "norm offset": "norm_offset",
    "norm kind": "norm_kind",
    "norm gain": "norm_gain_missing",
    "missing norm": "norm_missing",
    "another norm's gain": "another_weight exchanged_projections feature_gain",
    "another weight": "another_weight",
    "exchanged": "exchanged_projections",
    "missing bias": "missing_bias",
    "doubled bias": "doubled_bias",
    "wrong bias": "doubled_bias missing_bias feature_offset",
    "transposed weight": "transposed_weight",
    "permuted weight": "feature_order",
    "rank zero shard": "same_shard_everywhere",
    "quantised weight": "quantised_weights",
    "activation": "wrong_activation",
    "gate up swapped": "gate_up_swapped exchanged_projections",
    "expert layout": "gate_up_swapped",
    "expert bias": "missing_bias",
    "routing ignored": "routing_ignored",
    "routing unnormalised": "routing_unnormalised",
    "routing function": "routing_rule",
    "routing top-k": "routing_top_k",
    "expert order": "expert_order",
    "missing residual": "missing_residual",
    "residual multiplier": "residual_multiplier",
    "missing all-reduce": "missing_all_reduce",
    "doubled all-reduce": "doubled_all_reduce multiplier",
    "infinite": "overflow nonfinite",
    "nan": "nonfinite",
}
ACCEPTED: dict[str, frozenset[str]] = {planted: frozenset(names.split()) for planted, names in _NAMES.items()}

#: Classes of the published table: R > 10 missing_algorithm, > 3 missing_multiplier, > 1.2 precision_ordering.
MULTIPLIERS = frozenset(
    {
        "attention scale",
        "embedding multiplier",
        "logits multiplier",
        "multiplier",
        "residual multiplier",
        "rope factor",
        "missing bias",
        "doubled bias",
        "wrong bias",
        "expert bias",
        "doubled all-reduce",
    }
)
PRECISION = frozenset(
    {"softmax precision", "norm precision", "rope precision", "quantised weight", "norm epsilon", "clipping"}
)


def accepted(planted: str, named: str) -> bool:
    """Whether a diagnosis has called a planted cause by a right name."""
    return named in ACCEPTED.get(planted, frozenset())


def published_class(planted: str) -> str:
    """The class that the published table should give a planted cause."""
    if planted in MULTIPLIERS:
        return "missing_multiplier"
    return "precision_ordering" if planted in PRECISION else "missing_algorithm"


def class_of_size(r_ratio: float) -> str:
    """The class that the published table gives an R."""
    if r_ratio > 10:
        return "missing_algorithm"
    return "missing_multiplier" if r_ratio > 3 else "precision_ordering"
