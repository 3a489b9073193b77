"""The attention of a port: arguments of the library's class, and which of its methods are overridden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture, Attention, Number, Rotary
from .norm_plan import norm_constructor

#: From this release on, attention takes the divisor of scores as an argument.
TAKES_SCALE = "2.29"


def attention_plan(spec: Architecture, stem: str, sdk: str) -> dict[str, Any]:
    attention = spec.attention
    masks = {case.kind for case in attention.mask} - {"causal"}
    if len(masks) > 1:
        raise InputError("unsupported: windows and chunks in one model have no block yet")
    native_window = ""
    if len(attention.mask) == 1 and attention.mask[0].kind == "window":
        size = attention.mask[0].size
        assert size is not None
        native_window = size.expression.removeprefix("config.")
    local = "" if native_window or not masks else next(iter(masks))
    rotaries = [case.rotary for case in attention.rotary if case.rotary is not None]
    partial = any(r.dim.expression != attention.head_dim.expression.join(_brackets(attention)) for r in rotaries)
    layouts = {r.layout for r in rotaries}
    if len(layouts) > 1:
        raise InputError("unsupported: two pairings of rotated features in one model have no block yet")
    rotate = "interleaved" if "interleaved" in layouts else "partial" if partial else ""
    per_layer = len(attention.rotary) > 1 or bool(local)
    divisor = _divisor(attention)
    arguments = list(_arguments(spec, stem, divisor, sdk, native_window))
    before, rotary = _rotary_lines(attention, stem)
    if rotaries:
        arguments.insert(4, ("rotary_emb", rotary))
    after = []
    if local:
        after.append(f"self.local_size = {_case_expression([(c.condition, c.size) for c in attention.mask])}")
    norm_after = attention.query_key_norm is not None and attention.query_key_norm.after_rotary
    if norm_after:
        after += _norms_after(attention, stem)
    elif attention.query_key_norm is not None and attention.query_key_norm.scope != "head":
        eps = attention.query_key_norm.norm.eps.expression
        for name, is_query in (("q_layernorm", True), ("k_layernorm", False)):
            after.append(
                f"self.{name} = Neuron{stem}HeadsNorm(self.qkv_proj, self.head_dim, {eps}, is_query={is_query})"
            )
    if attention.softcap is not None:
        after.append(f"self.softcap = {attention.softcap.expression}")
    query_factor = bool(divisor) and sdk < TAKES_SCALE
    if query_factor:
        after.append(f"self.query_factor = {attention.scale.expression} * self.head_dim**0.5")
    hidden = " and ".join(w for w, found in (("local mask", local), ("softcap", attention.softcap)) if found)
    return {
        "arguments": arguments,
        "before": before,
        "after": after,
        "per_layer": per_layer,
        "rotate": rotate,
        "norm_after": norm_after,
        "partial": partial,
        "local_mask": local,
        "native_window": native_window,
        "no_kernel": hidden,
        "softcap": attention.softcap is not None,
        "divisor": "softmax_scale" if sdk >= TAKES_SCALE else "head_dim**0.5",
        "query_factor": query_factor,
        "summary": "",
        "grouped_queries": is_grouped(attention),
        "kv_heads": kv_heads_of(attention),
        "own_rotary": len(attention.rotary) > 1,
    }


def is_grouped(attention: Attention) -> bool:
    """Whether several, but not all, query heads share a KV head."""
    return attention.kv_heads.expression not in ("1", attention.heads.expression)


def kv_heads_of(attention: Attention) -> str:
    """The number of KV heads that ranks share out, as an expression."""
    return "config.sharded_kv_heads" if is_grouped(attention) else attention.kv_heads.expression


def heads_norm_plan(spec: Architecture) -> dict[str, Any] | None:
    """The norm of queries and keys that needs a block of its own, None without one."""
    found = spec.attention.query_key_norm
    if found is None or found.scope == "head":
        return None
    if found.norm.bias or found.norm.offset or not found.norm.weight:
        raise InputError("unsupported: norms over heads with a bias, an offset or without weight have no block yet")
    return {"scope": found.scope, "kind": found.norm.kind, "rounding": found.norm.rounding}


def _brackets(attention: Attention) -> tuple[str, str]:
    return ("(", ")") if " " in attention.head_dim.expression else ("", "")


def _divisor(attention: Attention) -> str:
    """The divisor of scores as an expression, empty for the library's own."""
    text = attention.scale.expression
    left, right = _brackets(attention)
    if text == f"{left}{attention.head_dim.expression}{right} ** -0.5":
        return ""
    return text.replace("** -0.5", "** 0.5") if text.endswith("** -0.5") else f"1 / {text}"


def _arguments(spec: Architecture, stem: str, divisor: str, sdk: str, native_window: str) -> Iterator[tuple[str, str]]:
    attention = spec.attention
    yield "hidden_size", "config.hidden_size"
    yield "num_attention_heads", attention.heads.expression
    yield "num_key_value_heads", kv_heads_of(attention)
    yield "head_dim", attention.head_dim.expression
    yield "num_cores_per_group", "config.num_cores_per_group"
    if any(attention.qkv_bias):
        yield "qkv_bias", "True"
    if attention.output_bias:
        yield "o_bias", "True"
    if divisor and sdk >= TAKES_SCALE:
        yield "softmax_scale", divisor
    if attention.clip is not None:
        yield "clip_qkv", attention.clip.expression
    norm = attention.query_key_norm
    if norm is not None and norm.scope == "head" and not norm.after_rotary:
        made = norm_constructor(norm.norm, attention.head_dim.expression, stem)
        yield "q_layernorm", made
        yield "k_layernorm", made
    if attention.sinks:
        yield "learned_sinks_size", "1"
    if native_window:
        yield "sliding_window", f"config.{native_window}"


def _norms_after(attention: Attention, stem: str) -> list[str]:
    """Norms of queries and keys that follow the rotary embedding: the library's own would precede it."""
    norm = attention.query_key_norm
    assert norm is not None
    if norm.scope != "head" or any(case.rotary is None for case in attention.rotary):
        raise InputError("unsupported: norms of rotated queries and keys over several heads have no block yet")
    made = norm_constructor(norm.norm, attention.head_dim.expression, stem)
    return [f"self.q_norm = {made}", f"self.k_norm = {made}"]


def _rotary_lines(attention: Attention, stem: str) -> tuple[list[str], str]:
    """Lines before the call of the base class, and the expression of the rotary embedding."""
    if len(attention.rotary) == 1:
        rotary = attention.rotary[0].rotary
        return [], "" if rotary is None else rotary_constructor(rotary, stem)
    lines = []
    for index, case in enumerate(attention.rotary):
        word = "if" if index == 0 else "else" if not case.condition else "elif"
        lines.append(f"{word} {case.condition}:" if case.condition else "else:")
        made = "None" if case.rotary is None else rotary_constructor(case.rotary, stem)
        lines.append(f"    rotary_emb = {made}")
    return lines, "rotary_emb"


def rotary_constructor(rotary: Rotary, stem: str) -> str:
    dim, base = rotary.dim.expression, rotary.theta.expression
    limit = "config.max_position_embeddings"
    scaling = rotary.scaling
    if rotary.kind == "default":
        return f"RotaryEmbedding({dim}, max_position_embeddings={limit}, base={base})"
    if rotary.kind == "linear":
        return f'RotaryEmbedding({dim}, max_position_embeddings={limit}, base={base}, factor={scaling}["factor"])'
    if rotary.kind == "llama3":
        given = ", ".join(
            f'{name}={scaling}["{name}"]'
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        return f"Llama3RotaryEmbedding(dim={dim}, max_position_embeddings={limit}, base={base}, {given})"
    if rotary.kind == "yarn":
        return f"{stem}YarnRotaryEmbedding({dim}, {limit}, {base}, {scaling})"
    if rotary.kind == "longrope":
        return f"{stem}LongRotaryEmbedding({dim}, config)"
    raise InputError(f"unsupported: rotary embedding {rotary.kind} has no block yet")


def rotary_plan(spec: Architecture, attention: dict[str, Any]) -> dict[str, Any]:
    rotaries = [case.rotary for case in spec.attention.rotary if case.rotary is not None]
    kinds = {rotary.kind for rotary in rotaries} & {"yarn", "longrope"}
    interleaved = attention["rotate"] == "interleaved"
    return {
        "rotary": bool(kinds) or interleaved,
        "rotary_kinds": kinds,
        "rotate": attention["rotate"],
        "theta_key": rotaries[0].theta.expression.removeprefix("config.") if rotaries else "",
    }


def _case_expression(cases: list[tuple[str, Number | None]]) -> str:
    text = "None"
    for condition, number in reversed(cases):
        value = "None" if number is None else number.expression
        text = f"{value} if {condition} else {text}" if condition else value
    return text
