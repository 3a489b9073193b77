"""What the same module is called in different implementations.

The rules know Hugging Face names and NxD Inference names. They propose; `mapping` accepts a proposal only when the
target recorded such a site and the shapes allow it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..store.names import is_attention
from .sites import Site

#: Leading path components that wrap a model without being part of it.
WRAPPERS = frozenset(
    {"model", "module", "transformer", "language_model", "_orig_mod", "base_model", "backbone", "decoder"}
)

#: Slots that hold a module's main output: a bare tensor, the first of a tuple, the field of a dataclass.
MAIN_SLOTS = ("", "0", "hidden_states")


@dataclass(frozen=True)
class Surroundings:
    """What the rules may know beside a site's own name.

    Attributes:
        reference: slots of the reference's modules, by canonical path.
        target: slots of the target's modules, by canonical path.
    """

    reference: Mapping[str, frozenset[str]] = field(default_factory=dict)
    target: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A target site that may hold the same values as a reference site.

    Attributes:
        target: the site, with its canonical module path.
        score: how specific the rule is, from 0 to 1.
        reason: why it is proposed.
        parts: for fused targets, the canonical reference modules whose outputs it concatenates along the last axis,
            in order; empty otherwise.
        leading: the target may be wider, then its first features are meant.
    """

    target: Site
    score: float
    reason: str
    parts: tuple[str, ...] = ()
    leading: bool = False


@dataclass(frozen=True)
class _Rule:
    """Modules that match `pattern` are called `module` elsewhere; main outputs correspond unless slots are given."""

    pattern: re.Pattern[str]
    module: str
    slots: Mapping[str, str] | None = None


_EXPERTS = r"(.*\.)?(?:block_sparse_moe|mlp)"
_RENAMED = tuple(
    _Rule(re.compile(f"{pattern}$"), module, slots)
    for pattern, module, slots in (
        (r"(.*\.)?q_norm", r"\1q_layernorm", None),
        (r"(.*\.)?k_norm", r"\1k_layernorm", None),
        (r"(.*\.)?(self_attn|attention|attn)\.o_proj", r"\1\2.o_proj.o_proj", None),
        (r"(.*\.)?block_sparse_moe", r"\1mlp", None),
        (_EXPERTS, r"\1mlp.expert_mlps", None),
        (_EXPERTS, r"\1block_sparse_moe.expert_mlps", None),
        (_EXPERTS, r"\1feed_forward", None),
        (_EXPERTS, r"\1feed_forward.moe", None),
        (_EXPERTS, r"\1feed_forward.moe.expert_mlps", None),
        (_EXPERTS + r"\.experts", r"\1mlp.expert_mlps", None),
        (_EXPERTS + r"\.experts", r"\1feed_forward.moe.expert_mlps", None),
    )
)
_FUSED = {
    "q_proj": (("q_proj", "k_proj", "v_proj"), ("qkv_proj.Wqkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn")),
    "gate_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)),
}
_FUSED["k_proj"] = _FUSED["v_proj"] = _FUSED["q_proj"]
_FUSED["up_proj"] = _FUSED["gate_proj"]
#: Where NxD keeps the experts of a layer.
FUSED_EXPERTS = (
    "mlp.expert_mlps",
    "mlp.moe.expert_mlps",
    "block_sparse_moe.expert_mlps",
    "feed_forward.moe.expert_mlps",
)
#: What transformers computes in modules within a block of experts, and NxD within its own.
_IN_EXPERTS = re.compile(r"(?P<layer>.*\.)?(?:block_sparse_moe|mlp)\.(?P<part>experts\..+|activation|moe_statics)$")
_ABSENT = {
    "experts": "sees the tokens routed to one expert only; the target computes all experts in {}",
    "activation": "sees the rows that the router grouped by expert; the target computes all experts in {}",
    "moe_statics": "adds the bias by which experts are chosen; the target's router does so itself, beside {}",
}
_ROUTERS = ("mlp.router", "block_sparse_moe.router", "feed_forward.moe.router")
_ROUTED = re.compile(_EXPERTS + r"(\.gate|\.router)?$")
_LAYER_ROTARY = re.compile(r"layers\.\d+\.(?:self_attn|attention|attn)\.rotary_emb$")
_LAYER = re.compile(r"layers\.(\d+)\.")


def canonical(module: str) -> str:
    """A module path without wrapping components: `model.layers.0.mlp` becomes `layers.0.mlp`."""
    parts = module.split(".")
    while parts and parts[0] in WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def proposals(site: Site, around: Surroundings | None = None) -> Iterator[Proposal]:
    """Target sites that may correspond to a reference site, best first.

    Args:
        site: the reference site, with its canonical module path.
        around: what else is known.
    """
    around = around or Surroundings()
    if not _returns_other_things(site, around):
        for slot, score in _slots(site):
            yield Proposal(_at(site, site.module, slot), score, "same name")
    for rule in _RENAMED:
        if rule.pattern.match(site.module) and site.slot in MAIN_SLOTS:
            module = rule.pattern.sub(rule.module, site.module)
            for slot, score in _slots(site):
                yield Proposal(_at(site, module, slot), 0.9 * score, f"known as {module}")
    yield from _routing(site, around)
    yield from _rotary(site, around)
    if _is_attention_weights(site, around):
        yield Proposal(Site(site.module, "tap", "weights", site.call), 0.9, "attention weights")
    prefix, _, leaf = site.module.rpartition(".")
    if leaf in _FUSED and site.slot in MAIN_SLOTS and site.port == "output":
        yield from _fused(site, prefix, leaf)
    if leaf == "v_proj" and site.slot in MAIN_SLOTS and site.port == "output":
        yield from _value_cache(site, prefix)


def split_modules(module: str) -> Iterator[tuple[tuple[Site, ...], str]]:
    """For a fused reference module, the target sites whose outputs it may concatenate, in order, and why."""
    prefix, _, leaf = module.rpartition(".")
    dotted = f"{prefix}." if prefix else ""
    for leaves, names in (_FUSED["q_proj"], _FUSED["gate_proj"]):
        if leaf not in {name.rpartition(".")[2] for name in names}:
            continue
        reason = f"{leaf} concatenates {', '.join(leaves)}"
        yield tuple(Site(f"{dotted}{name}") for name in leaves), reason
        yield tuple(Site(f"{module}.{name}") for name in leaves), reason
        yield tuple(Site(module, slot=str(index)) for index in range(len(leaves))), reason


def no_counterpart(site: Site, around: Surroundings) -> str | None:
    """Why a target of this structure cannot have recorded a reference site, or None if it could.

    Args:
        site: the reference site, with its canonical module path.
        around: what else is known.
    """
    inside = _IN_EXPERTS.match(site.module)
    if inside:
        prefix = inside["layer"] or ""
        fused = next((prefix + name for name in FUSED_EXPERTS if prefix + name in around.target), None)
        if fused is not None:
            return _ABSENT["experts" if inside["part"].startswith("experts.") else inside["part"]].format(fused)
    if _is_attention_weights(site, around):
        return "attention weights, which the target does not return; --scores records them"
    routed = _ROUTED.match(site.module)
    others = [name for name in _ROUTERS if routed and (routed[1] or "") + name in around.target]
    if routed and others and site.slot == "1" and not _routed(site, routed[2], around):
        return "weights of the chosen experts; the target returns those of all experts"
    return None


def _is_attention_weights(site: Site, around: Surroundings) -> bool:
    return is_attention(site.module) and site.slot == "1" and site.module in around.target


def _returns_other_things(site: Site, around: Surroundings) -> bool:
    """Whether the target's router of the same name returns another tuple; `_routing` knows which element is which."""
    slots = around.target.get(site.module, frozenset())
    return site.module.endswith(_ROUTERS) and slots != around.reference.get(site.module, slots)


def _slots(site: Site) -> Iterator[tuple[str, float]]:
    """The slot itself, then other names of a main output; a root's first output is its logits."""
    yield site.slot, 1.0
    same = (*MAIN_SLOTS, "logits") if site.module == "" else MAIN_SLOTS
    if site.slot in same:
        yield from ((other, 0.95) for other in same if other != site.slot)


def _routing(site: Site, around: Surroundings) -> Iterator[Proposal]:
    """A router's logits, affinities of all experts and chosen experts, wherever transformers returns them.

    NxD's router returns (logits, affinities, indices). A transformers gate is a linear layer or, since transformers
    5, returns (logits, weights of the chosen, indices); gpt_oss's router returned (affinities, indices) before. An
    MoE block's second output is one of these: affinities of the chosen or of all where its child is a router.
    """
    match = _ROUTED.match(site.module)
    which = _routed(site, match[2], around) if match else ""
    if match is None or not which:
        return
    for name in _ROUTERS:
        router = (match[1] or "") + name
        if router == site.module and not _returns_other_things(site, around):
            continue
        if which == "0":
            yield Proposal(_at(site, f"{router}.linear_router", ""), 0.9, "logits of the router")
        meaning = {"0": "logits", "1": "affinities", "2": "chosen experts"}[which]
        yield Proposal(_at(site, router, which), 0.85, f"{meaning} of the router")


def _routed(site: Site, child: str | None, around: Surroundings) -> str:
    """Which element of NxD's router tuple a reference site is, or empty."""
    if child == ".gate":
        return {"": "0", "0": "0", "2": "2"}.get(site.slot, "")
    router = site.module if child else f"{site.module}.router"
    slots = around.reference.get(router)
    logits_first = slots is not None and "2" in slots
    if child == ".router":
        return ({"0": "0", "2": "2"} if logits_first else {"0": "1", "1": "2"}).get(site.slot, "")
    if site.slot != "1" or logits_first:
        return ""
    return "0" if slots is None else "1"


def _rotary(site: Site, around: Surroundings) -> Iterator[Proposal]:
    """One rotary embedding for the model, or one per layer (which may double the angles: cos, cos)."""
    if site.module == "rotary_emb":
        for module in filter(_LAYER_ROTARY.match, around.target):
            yield Proposal(_at(site, module, site.slot), 0.9, f"known as {module}", leading=True)


def _fused(site: Site, prefix: str, leaf: str) -> Iterator[Proposal]:
    leaves, fused_names = _FUSED[leaf]
    dotted = f"{prefix}." if prefix else ""
    if "qkv_proj.Wqkv" in fused_names:
        yield Proposal(_at(site, f"{dotted}qkv_proj.{leaf}", ""), 0.9, f"{leaf} of the fused projection")
        yield Proposal(
            _at(site, f"{dotted}qkv_proj", str(leaves.index(leaf))), 0.9, "element of the projection's tuple"
        )
    parts = tuple(f"{dotted}{name}" for name in leaves)
    for name in fused_names:
        reason = f"{name} concatenates {', '.join(leaves)}"
        yield Proposal(_at(site, f"{dotted}{name}", ""), 0.8, reason, parts)


def _value_cache(site: Site, prefix: str) -> Iterator[Proposal]:
    """Values enter the cache as they are projected (keys are rotated first)."""
    reason = "values as the cache keeps them"
    yield Proposal(_at(site, prefix, "present_key_value.1"), 0.7, reason)
    layer = _LAYER.match(site.module)
    if layer:
        yield Proposal(_at(site, f"layers.{layer[1]}", "1.1"), 0.7, reason)
        yield Proposal(_at(site, "", str(2 * int(layer[1]) + 2)), 0.7, reason)


def _at(site: Site, module: str, slot: str) -> Site:
    return Site(module, site.port, slot, site.call)
