"""Multi-head latent attention in a port: a class of its own, the cache holds latents."""

from __future__ import annotations

from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture
from .attention_plan import rotary_constructor
from .norm_plan import norm_constructor


def latent_plan(spec: Architecture, stem: str, sdk: str) -> dict[str, Any]:
    """What the templates print; takes the place of `attention_plan`.

    Raises:
        InputError: the architecture combines latents with something that has no block.
    """
    attention = spec.attention
    latent, rotary = attention.latent, attention.rotary[0].rotary
    assert latent is not None
    plain = len(attention.rotary) == 1 and [case.kind for case in attention.mask] == ["causal"]
    if rotary is None or not plain or attention.softcap is not None or attention.sinks:
        raise InputError("unsupported: latents with windows, softcaps, sinks or without positions have no block yet")
    return {
        "rotary": rotary_constructor(rotary, stem),
        "rotate": "interleaved" if rotary.layout == "interleaved" else "",
        "query_norm": norm_constructor(latent.norm, latent.query_rank.expression, stem) if latent.query_rank else "",
        "latent_norm": norm_constructor(latent.norm, latent.rank.expression, stem),
        "per_layer": False,
        "own_rotary": False,
        "native_window": "",
        "grouped_queries": False,
        "kv_heads": "1",
    }
