"""How a checkpoint's weights become the port's: renamed, split, transposed."""

from __future__ import annotations

from typing import Any

from ..spec.architecture import Architecture, Attention, FeedForward, MixtureOfExperts
from .attention_plan import is_grouped
from .expert_conversion import expert_lines
from .mixture_plan import target_of
from .packed_conversion import unpacking

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def conversion_of(spec: Architecture) -> dict[str, Any]:
    """Renames, statements and functions of the conversion.

    Returns:
        For the template: `prefix`, `renames` and `renames_in_layers` as pairs, `head_lines` (before the layers),
        `layer_lines` (inside the loop; `layer` and `attention` are in scope) and `functions` (source texts).
    """
    prefix = spec.prefix
    renames = _renames(spec, prefix)
    inside = _renames_in_layers(spec)
    head_lines, functions = unpacking(spec.packing)
    if renames or inside:
        head_lines.append("state_dict = rename(state_dict)")
        functions.append(_rename_source(spec, bool(renames), bool(inside)))
    lines, more = _layer_lines(spec)
    return {
        "prefix": prefix,
        "renames": renames,
        "renames_in_layers": inside,
        "head_lines": head_lines,
        "layer_lines": lines,
        "functions": [*functions, *more],
    }


def _renames(spec: Architecture, prefix: str) -> list[tuple[str, str]]:
    pairs = [
        (spec.embedding.module, "embed_tokens"),
        (spec.layer.path, "layers"),
        (spec.head.norm_module, "norm"),
        (spec.head.module, "lm_head"),
    ]
    if spec.embedding.positions is not None:
        module = spec.embedding.positions.module
        pairs.append((module, module.rpartition(".")[2]))
    stripped = [(old.removeprefix(prefix), new) for old, new in pairs]
    return [(old, new) for old, new in stripped if old != new]


def _renames_in_layers(spec: Architecture) -> list[tuple[str, str]]:
    attention = spec.attention
    module = attention.module
    pairs = []
    if attention.layout == "separate":
        pairs += [
            (f"{module}.{old}", f"{module}.{new}") for old, new in zip(attention.projections, _PROJECTIONS, strict=True)
        ]
    pairs.append((f"{module}.{attention.output}", f"{module}.o_proj"))
    if attention.query_key_norm is not None:
        kind = "norm" if attention.query_key_norm.after_rotary else "layernorm"
        pairs.append((f"{module}.{attention.query_key_norm.query}", f"{module}.q_{kind}"))
        pairs.append((f"{module}.{attention.query_key_norm.key}", f"{module}.k_{kind}"))
    for case in spec.feed_forward:
        pairs += _block_renames(case.block) if case.block is not None else _expert_renames(case.experts)
    return [(old, new) for old, new in pairs if old != new]


def _expert_renames(mixture: MixtureOfExperts | None) -> list[tuple[str, str]]:
    assert mixture is not None
    module, target = mixture.module, target_of(mixture)
    return [(f"{module}.{mixture.router.module}", f"{target}.router.linear_router")]


def _block_renames(block: FeedForward) -> list[tuple[str, str]]:
    pairs = []
    names = block_names(block)
    inside = f"{block.module}." if block.module else ""
    target = f"{block.module or 'mlp'}."
    if block.layout == "separate":
        old_names = [block.gate, block.up, block.down] if block.kind == "gated" else [block.up, block.down]
        pairs += [(f"{inside}{old}", f"{target}{new}") for old, new in zip(old_names, names, strict=True)]
    else:
        pairs.append((f"{inside}{block.down}", f"{target}{names[-1]}"))
    return pairs


def block_names(block: FeedForward) -> tuple[str, ...]:
    """What the projections of a feed-forward block are called in the port: gate and up, or up alone; then down."""
    if block.kind == "gated":
        return "gate_proj", "up_proj", "down_proj"
    return block.up, block.down


def _layer_lines(spec: Architecture) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    functions: list[str] = []
    attention = spec.attention
    if attention.transposed:
        names = [*attention.projections, "o_proj"]
        lines.append(f"for name in ({', '.join(repr(n) for n in names)}):".replace("'", '"'))
        lines.append('    state_dict[f"{attention}.{name}.weight"] = state_dict[f"{attention}.{name}.weight"].t()')
    if attention.layout in ("plain", "grouped"):
        lines.append("split_qkv(state_dict, attention, config)")
        functions.append(_split_qkv_source(attention))
    elif len(set(attention.qkv_bias)) > 1:
        lines.append("add_missing_biases(state_dict, attention)")
        functions.append(_MISSING_BIASES)
    if attention.sinks:
        old = f'f"{{attention}}.{attention.sinks}"'
        lines.append(f'state_dict[f"{{attention}}.learned_sinks.sink"] = state_dict.pop({old})')
    norms = attention.query_key_norm
    if norms is not None and norms.list_name:
        lines.append('for name in ("q_layernorm", "k_layernorm"):')
        lines.append(f'    join_heads(state_dict, f"{{attention}}.{{name}}", "{norms.list_name}")')
        functions.append(_JOIN_HEADS)
    if is_grouped(attention) and attention.latent is None:
        kv_heads = attention.kv_heads.expression
        lines.append(f"repeats = config.sharded_kv_heads // {kv_heads}")
        lines.append("if repeats > 1:")
        lines.append(f"    repeat_kv_heads(state_dict, attention, {kv_heads}, repeats)")
        functions.append(_REPEAT_KV_HEADS)
    for case in spec.feed_forward:
        found = _block_lines(case.block) if case.block is not None else expert_lines(case.experts, spec)
        lines += found[0]
        functions += found[1]
    return lines, functions


def _block_lines(block: FeedForward) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    functions: list[str] = []
    name = block.module or "mlp"
    if block.transposed:
        lines.append(f"for name in ({', '.join(repr(n) for n in block_names(block))}):".replace("'", '"'))
        key = f'f"layers.{{layer}}.{name}.{{name}}.weight"'
        lines.append(f"    state_dict[{key}] = state_dict[{key}].t()")
    if block.layout != "separate":
        lines.append(f'split_gate_up(state_dict, f"layers.{{layer}}.{name}")')
        functions.append(_split_gate_up_source(block))
    return lines, functions


def _rename_source(spec: Architecture, outside: bool, inside: bool) -> str:
    lines = ["def rename(state_dict):", '    """Give weights the names of the modules that use them here."""']
    lines += ["    renamed = {}", "    for name, weight in state_dict.items():"]
    if outside:
        lines += [
            "        for old, new in RENAMED.items():",
            '            if name.startswith(f"{old}."):',
            '                name = f"{new}.{name.removeprefix(old)[1:]}"',
            "                break",
        ]
    if inside:
        lines += [
            '        if name.startswith("layers."):',
            '            _, layer, inner = name.split(".", 2)',
            '            module, _, kind = inner.rpartition(".")',
            '            name = f"layers.{layer}.{RENAMED_IN_LAYER.get(module, module)}.{kind}"',
        ]
    lines += ["        renamed[name] = weight", "    return renamed"]
    return "\n".join(lines)


def _split_qkv_source(attention: Attention) -> str:
    fused = attention.projections[0]
    heads, kv_heads = attention.heads.expression, attention.kv_heads.expression
    lines = ["def split_qkv(state_dict, attention, config):"]
    if attention.layout == "plain":
        lines.append('    """One projection has the rows of queries, keys and values, in this order."""')
    else:
        lines.append('    """One projection has, for every KV head, the rows of its queries, its key and its value."""')
    lines += [
        f"    head_dim = {attention.head_dim.expression}",
        '    for kind in ("weight", "bias"):',
        f'        name = f"{{attention}}.{fused}.{{kind}}"',
        "        if name not in state_dict:",
        "            continue",
        "        rows = state_dict.pop(name)",
    ]
    if attention.layout == "plain":
        lines += [
            f"        widths = ({heads} * head_dim, {kv_heads} * head_dim, {kv_heads} * head_dim)",
            "        query, key, value = rows.split(widths)",
        ]
    else:
        lines += [
            f"        groups = rows.reshape({kv_heads}, -1, head_dim, *rows.shape[1:])",
            "        query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]",
        ]
    lines += [
        '        for projection, part in (("q_proj", query), ("k_proj", key), ("v_proj", value)):',
        '            state_dict[f"{attention}.{projection}.{kind}"] = part.reshape(-1, *rows.shape[1:]).clone()',
    ]
    return "\n".join(lines)


def _split_gate_up_source(block: FeedForward) -> str:
    first, second = ("gate", "up") if block.layout == "gate_first" else ("up", "gate")
    return "\n".join(
        [
            "def split_gate_up(state_dict, mlp):",
            f'    """One projection has the rows of {first}, then those of {second}."""',
            '    for kind in ("weight", "bias"):',
            f'        name = f"{{mlp}}.{block.up}.{{kind}}"',
            "        if name in state_dict:",
            f"            {first}, {second} = state_dict.pop(name).chunk(2)",
            '            state_dict[f"{mlp}.gate_proj.{kind}"] = gate.clone()',
            '            state_dict[f"{mlp}.up_proj.{kind}"] = up.clone()',
        ]
    )


_JOIN_HEADS = '''def join_heads(state_dict, norm, list_name):
    """Every head has a module of its own in the checkpoint; here, a row of one weight."""
    names = [name for name in state_dict if name.startswith(f"{norm}.{list_name}.")]
    names.sort(key=lambda name: int(name.split(".")[-2]))
    state_dict[f"{norm}.weight"] = torch.stack([state_dict.pop(name) for name in names])'''

_REPEAT_KV_HEADS = '''def repeat_kv_heads(state_dict, attention, kv_heads, repeats):
    """Give every query head a key and a value head of its own."""
    for name in (f"{attention}.{part}.{kind}" for part in ("k_proj", "v_proj") for kind in ("weight", "bias")):
        if name in state_dict:
            rows = state_dict[name]
            heads = rows.reshape(kv_heads, -1, *rows.shape[1:])
            state_dict[name] = heads.repeat_interleave(repeats, dim=0).reshape(-1, *rows.shape[1:])'''

_MISSING_BIASES = '''def add_missing_biases(state_dict, attention):
    """The library adds a bias to queries, keys and values, or to none."""
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = state_dict[f"{attention}.{name}.weight"]
        state_dict.setdefault(f"{attention}.{name}.bias", torch.zeros(weight.shape[0], dtype=weight.dtype))'''
