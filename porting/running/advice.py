"""What a tensor-parallel degree does to a model: sizes that do not divide, and degrees that would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VOCABULARY, _HEADS = "vocab_size", ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads")
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "n_inner")


def advise(config: Mapping[str, Any], tp: int, ep: int = 1) -> list[str]:
    """Remarks on a model's sizes, each with what to do.

    Args:
        config: the model's configuration (its text part, for a model of several).
        tp: tensor-parallel degree.
        ep: expert-parallel degree.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)
    remarks = []
    vocabulary = text.get(_VOCABULARY)
    if isinstance(vocabulary, int) and vocabulary % tp:
        remarks.append(
            f"vocab_size {vocabulary} is not divisible by tp_degree {tp}: the library pads the embedding and the head; "
            f"degrees that divide it: {_divisors(vocabulary)}"
        )
    heads = _first(text, _HEADS)
    if heads and heads % tp:
        remarks.append(
            f"{heads} attention heads are not divisible by tp_degree {tp}: heads are padded, the extra ones computed "
            f"for nothing; degrees that divide them: {_divisors(heads)}"
        )
    kv_heads = _first(text, _KV_HEADS) or heads
    if kv_heads and kv_heads % tp and tp % kv_heads:
        remarks.append(
            f"{kv_heads} KV heads and tp_degree {tp} do not divide each other: the library converts to multi-head "
            f"attention, and the cache grows {(heads or kv_heads) / kv_heads:g} times"
        )
    elif kv_heads and tp > kv_heads:
        remarks.append(f"{kv_heads} KV heads on {tp} ranks: each is held by {tp // kv_heads} ranks; expected, no error")
    for name in _WIDTHS:
        width = text.get(name)
        if isinstance(width, int) and width % tp:
            remarks.append(f"{name} {width} is not divisible by tp_degree {tp}; choose {_divisors(width)}")
    experts = _first(text, ("num_local_experts", "num_experts", "n_routed_experts"))
    if experts and experts % ep:
        remarks.append(f"{experts} experts are not divisible by ep_degree {ep}; choose {_divisors(experts)}")
    return remarks


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in (1, 2, 4, 8, 16, 32, 64) if number % n == 0)
