"""What a port contains, decided from a spec: which blocks, which arguments, which lines.

Templates print it; nothing is decided there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture, Attention, FeedForward, Norm, Number, Rotary, Term
from ..spec.document import numbers_in
from .conversion import conversion_of

#: Releases of the SDK by NxD Inference version.
RELEASES = {"2.27": "0.7", "2.28": "0.8", "2.29": "0.9"}
#: From this release on, attention takes the divisor of scores as an argument.
_TAKES_SCALE = "2.29"
_REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "pad_token_id", "vocab_size")
#: Activations for which the library's own block has kernels.
_NATIVE_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def plan(spec: Architecture, sdk: str | None) -> dict[str, Any]:
    """Everything that the templates print.

    Args:
        spec: the architecture.
        sdk: release of the Neuron SDK, None for the newest.

    Raises:
        InputError: the release is unknown, or the architecture needs a block that does not exist.
    """
    if sdk is not None and sdk not in RELEASES:
        raise InputError(f"SDK {sdk!r} is unknown; choose one of {', '.join(RELEASES)}")
    stem = stem_of(spec)
    attention = _attention(spec, stem, sdk or _TAKES_SCALE)
    feed_forwards = _feed_forwards(spec)
    derived = list(_derived(spec, attention, feed_forwards))
    return {
        "spec": spec,
        "stem": stem,
        "facts_file": "architecture.json",
        "release": f" {RELEASES[sdk]} (SDK {sdk})" if sdk else "",
        "norm": _norm(spec),
        "blocks": _rotary_blocks(spec, attention),
        "attention": attention,
        "feed_forwards": feed_forwards,
        "layer": _layer(spec, stem, attention, feed_forwards),
        "embedding": _embedding(spec, stem),
        "head": _head(spec, stem),
        "conversion": conversion_of(spec),
        "neuron_config_base": "NeuronConfig",
        "derived": derived,
        "required": list(_required(spec)),
    }


def stem_of(spec: Architecture) -> str:
    """The model's name in class names: `Llama` of LlamaForCausalLM."""
    return re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", spec.class_name)


def norm_constructor(norm: Norm, size: str, stem: str) -> str:
    """The expression that makes a norm."""
    if norm.kind == "layer":
        affine = "" if norm.weight else ", elementwise_affine=False"
        bias = "" if norm.bias or not norm.weight else ", bias=False"
        return f"nn.LayerNorm({size}, eps={norm.eps.expression}{affine}{bias})"
    if not norm.weight:
        raise InputError("unsupported: an RMS norm without weight has no block yet")
    made = "get_rmsnorm_cls()" if _is_kernel_norm(norm) else f"{stem}RMSNorm"
    return f"{made}({size}, eps={norm.eps.expression})"


def _is_kernel_norm(norm: Norm) -> bool:
    return norm.kind == "rms" and norm.offset == 0 and norm.rounding == "normalized"


def _all_norms(spec: Architecture) -> Iterator[Norm]:
    yield from (named.norm for named in spec.layer.norms)
    yield spec.head.norm
    if spec.attention.query_key_norm is not None:
        yield spec.attention.query_key_norm.norm


def _norm(spec: Architecture) -> dict[str, Any]:
    rms = {(norm.offset, norm.rounding) for norm in _all_norms(spec) if norm.kind == "rms"}
    if len(rms) > 1:
        raise InputError("unsupported: two kinds of RMS norm in one model have no block yet")
    if not rms:
        return {"define": False}
    (offset, rounding) = next(iter(rms))
    kernel = offset == 0 and rounding == "normalized"
    return {"define": True, "kind": "kernel" if kernel else "plain", "offset": offset}


def _required(spec: Architecture) -> Iterator[str]:
    """Configuration keys that the port reads, in alphabetical order."""
    keys = set(_REQUIRED)
    for text in numbers_in(spec):
        keys |= set(re.findall(r"config\.(\w+)", text))
    yield from sorted(keys)


def _derived(spec: Architecture, attention: dict[str, Any], feed_forwards: list[dict[str, Any]]) -> Iterator[str]:
    """Lines that give the library's blocks the names they read."""
    if any(ff["native"] for ff in feed_forwards):
        block = spec.feed_forward[0].block
        for name, expression in (
            ("hidden_act", block.activation),
            ("intermediate_size", block.intermediate.expression),
            ("rms_norm_eps", spec.head.norm.eps.expression),
        ):
            if expression != f"config.{name}":
                yield f"self.{name} = {expression.replace('config.', 'self.')}"
        if block.up_bias:
            yield "self.mlp_bias = True"
    if attention["native_window"]:
        window = attention["native_window"]
        yield "# a window as long as the cache hides nothing"
        yield f"if self.{window} is not None and self.{window} >= self.neuron_config.seq_len:"
        yield f"    self.{window} = None"


def _attention(spec: Architecture, stem: str, sdk: str) -> dict[str, Any]:
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
    if attention.softcap is not None:
        after.append(f"self.softcap = {attention.softcap.expression}")
    query_factor = bool(divisor) and sdk < _TAKES_SCALE
    if query_factor:
        after.append(f"self.query_factor = {attention.scale.expression} * self.head_dim**0.5")
    hidden = " and ".join(w for w, found in (("local mask", local), ("softcap", attention.softcap)) if found)
    return {
        "arguments": arguments,
        "before": before,
        "after": after,
        "per_layer": per_layer,
        "rotate": rotate,
        "partial": partial,
        "local_mask": local,
        "native_window": native_window,
        "no_kernel": hidden,
        "softcap": attention.softcap is not None,
        "divisor": "softmax_scale" if sdk >= _TAKES_SCALE else "head_dim**0.5",
        "query_factor": query_factor,
        "summary": "",
        "own_rotary": len(attention.rotary) > 1,
    }


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
    yield "num_key_value_heads", attention.kv_heads.expression
    yield "head_dim", attention.head_dim.expression
    yield "num_cores_per_group", "config.num_cores_per_group"
    if any(attention.qkv_bias):
        yield "qkv_bias", "True"
    if attention.output_bias:
        yield "o_bias", "True"
    if divisor and sdk >= _TAKES_SCALE:
        yield "softmax_scale", divisor
    if attention.clip is not None:
        yield "clip_qkv", attention.clip.expression
    if attention.query_key_norm is not None:
        if attention.query_key_norm.scope != "head" or attention.query_key_norm.after_rotary:
            raise InputError(f"unsupported: norms of queries and keys over {attention.query_key_norm.scope}")
        made = norm_constructor(attention.query_key_norm.norm, attention.head_dim.expression, stem)
        yield "q_layernorm", made
        yield "k_layernorm", made
    if attention.sinks:
        yield "learned_sinks_size", "1"
    if native_window:
        yield "sliding_window", f"config.{native_window}"


def _rotary_lines(attention: Attention, stem: str) -> tuple[list[str], str]:
    """Lines before the call of the base class, and the expression of the rotary embedding."""
    if len(attention.rotary) == 1:
        rotary = attention.rotary[0].rotary
        return [], "" if rotary is None else _rotary_constructor(rotary, stem)
    lines = []
    for index, case in enumerate(attention.rotary):
        word = "if" if index == 0 else "else" if not case.condition else "elif"
        lines.append(f"{word} {case.condition}:" if case.condition else "else:")
        made = "None" if case.rotary is None else _rotary_constructor(case.rotary, stem)
        lines.append(f"    rotary_emb = {made}")
    return lines, "rotary_emb"


def _rotary_constructor(rotary: Rotary, stem: str) -> str:
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


def _rotary_blocks(spec: Architecture, attention: dict[str, Any]) -> dict[str, Any]:
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


def _feed_forwards(spec: Architecture) -> list[dict[str, Any]]:
    if len(spec.feed_forward) != 1:
        raise InputError("unsupported: layers with different feed-forward blocks have no block yet")
    return [_feed_forward(case.block) for case in spec.feed_forward]


def _feed_forward(block: FeedForward) -> dict[str, Any]:
    gated = block.kind == "gated"
    native = gated and block.activation_name in _NATIVE_ACTIVATIONS and block.up_bias == block.down_bias
    names = [block.gate, block.up] if gated else [block.up]
    if block.layout != "separate" or native:
        names = ["gate_proj", "up_proj"]
    down = "down_proj" if native or gated else block.down
    formula = f"{down}(act({names[0]}(x)) * {names[1]}(x))" if gated else f"{down}(act({names[0]}(x)))"
    return {
        "native": native,
        "define": not native,
        "class_suffix": "MLP",
        "description": f"{block.class_name}: {formula}." if block.module else f"{formula}.",
        "activation": block.activation,
        "intermediate": block.intermediate.expression,
        "ups": names,
        "down": down,
        "up_bias": block.up_bias,
        "down_bias": block.down_bias,
        "gated": gated,
        "name": block.module or "mlp",
    }


def _layer(
    spec: Architecture, stem: str, attention: dict[str, Any], feed_forwards: list[dict[str, Any]]
) -> dict[str, Any]:
    index = ", layer_idx" if attention["per_layer"] else ""
    modules = []
    norms = {named.name: named.norm for named in spec.layer.norms}
    block = feed_forwards[0]
    for node in spec.layer.nodes:
        if node.role == "norm":
            modules.append(f"self.{node.name} = {norm_constructor(norms[node.name], 'config.hidden_size', stem)}")
        elif node.role == "attention":
            modules.append(f"self.{node.name} = Neuron{stem}Attention(config{index})")
        else:
            made = "NeuronLlamaMLP" if block["native"] else f"Neuron{stem}{block['class_suffix']}"
            modules.append(f"self.{block['name']} = {made}(config)")
    terms = [term for node in spec.layer.nodes for term in node.terms] + list(spec.layer.output)
    factors = dict.fromkeys(term.factor for term in terms if term.factor is not None)
    modules.extend(f"self.{_attribute(factor)} = {factor.expression}" for factor in factors)
    return {
        "modules": modules,
        "forward": list(_forward(spec, block)),
        "per_layer": attention["per_layer"],
        "own_rotary": attention["own_rotary"],
    }


def _forward(spec: Architecture, block: dict[str, Any]) -> Iterator[str]:
    """Statements that compute a layer, one per module and one per sum."""
    names = {"hidden_states": "hidden_states"}
    sums: dict[tuple[Term, ...], str] = {}
    for node in spec.layer.nodes:
        if len(node.terms) > 1 and node.terms not in sums:
            name = "residual" if not sums else f"residual_{len(sums) + 1}"
            yield f"{name} = {_sum(node.terms, names, sums)}"
            sums[node.terms] = name
        given = _sum(node.terms, names, sums)
        if node.role == "attention":
            yield f"attention = self.{node.name}("
            yield f"    {given},"
            for argument in ("attention_mask", "position_ids", "past_key_value"):
                yield f"    {argument}={argument},"
            yield "    **kwargs,"
            yield ")"
            names[node.name] = "attention.hidden_states"
            continue
        names[node.name] = f"after_{node.name}"
        called = block["name"] if node.role == "feed_forward" else node.name
        first = "[0]" if node.role == "feed_forward" and block["native"] else ""
        yield f"{names[node.name]} = self.{called}({given}){first}"
    yield f"hidden_states = {_sum(spec.layer.output, names, sums)}"


def _sum(terms: tuple[Term, ...], names: dict[str, str], sums: dict[tuple[Term, ...], str]) -> str:
    if terms in sums:
        return sums[terms]
    parts = []
    rest = list(terms)
    for known in sorted(sums, key=len, reverse=True):
        if all(term in rest for term in known):
            rest = [term for term in rest if term not in known]
            parts.append(sums[known])
            break
    for term in rest:
        text = names[term.node]
        parts.append(text if term.factor is None else f"{text} * self.{_attribute(term.factor)}")
    return " + ".join(parts)


def _attribute(number: Number) -> str:
    return number.expression.removeprefix("config.")


def _embedding(spec: Architecture, stem: str) -> dict[str, Any]:
    embedding = spec.embedding
    lines = []
    summary = []
    factor = embedding.factor
    if factor is not None and not embedding.in_module:
        if embedding.factor_rounded:
            lines.append(f"factor = torch.tensor({_of_self(factor)}, dtype=inputs_embeds.dtype)")
            lines.append("inputs_embeds = inputs_embeds * factor")
        else:
            lines.append(f"inputs_embeds = inputs_embeds * {_of_self(factor)}")
        summary.append("scaled")
    positions = embedding.positions
    name = positions.module.rpartition(".")[2] if positions is not None else ""
    if positions is not None:
        shifted = f"position_ids + {positions.offset}" if positions.offset else "position_ids"
        lines.append(f"inputs_embeds = inputs_embeds + self.{name}({shifted})")
        summary.append("with learned positions added")
    scaled = factor is not None and embedding.in_module
    return {
        "scaled_module": scaled,
        "class_name": f"Neuron{stem}ScaledEmbedding" if scaled else "ParallelEmbedding",
        "factor": factor.expression if factor is not None else "",
        "positions": name,
        "rows": positions.rows.expression if positions is not None else "",
        "lines": lines,
        "summary": f"Token embeddings, {' and '.join(summary)}." if summary else "",
    }


def _of_self(number: Number) -> str:
    return number.expression.replace("config.", "self.config.")


def _head(spec: Architecture, stem: str) -> dict[str, Any]:
    head = spec.head
    define = head.scale is not None or head.softcap is not None
    init, forward = [], []
    words = []
    if head.scale is not None:
        init.append(f"self.logit_scale = {head.scale.expression}")
        words.append("times a factor")
    if head.softcap is not None:
        init.append(f"self.softcap = {head.softcap.expression}")
        words.append("bounded by a tanh")
    scaled = "logits * self.logit_scale" if head.scale is not None else "logits"
    if head.softcap is not None:
        forward.append(f"return self.softcap * torch.tanh({scaled} / self.softcap)")
    else:
        forward.append(f"return {scaled}")
    arguments = ["config"] if define else ["config.hidden_size", "config.vocab_size"]
    return {
        "define": define,
        "summary": f", {' and '.join(words)}" if words else "",
        "init": init,
        "forward": forward,
        "arguments": arguments,
        "constructor": f"Neuron{stem}LMHead" if define else "ColumnParallelLinear",
        "norm": norm_constructor(head.norm, "config.hidden_size", stem),
    }
