"""What the same module is called in different implementations.

The rules know Hugging Face names and NxD Inference names. They propose; `mapping` accepts a proposal only when the
target recorded such a site and the shapes allow it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .sites import Site

#: Leading path components that wrap a model without being part of it.
WRAPPERS = frozenset(
    {"model", "module", "transformer", "language_model", "_orig_mod", "base_model", "backbone", "decoder"}
)

#: Slots that hold a module's main output: a bare tensor, the first of a tuple, the field of a dataclass.
MAIN_SLOTS = ("", "0", "hidden_states")

_RENAMED = (
    (re.compile(r"(.*\.)?q_norm$"), r"\1q_layernorm"),
    (re.compile(r"(.*\.)?k_norm$"), r"\1k_layernorm"),
    (re.compile(r"(.*\.)?block_sparse_moe$"), r"\1mlp"),
    (re.compile(r"(.*\.)?(?:block_sparse_moe|mlp)\.gate$"), r"\1mlp.router.linear_router"),
    (re.compile(r"(.*\.)?(self_attn|attention|attn)\.o_proj$"), r"\1\2.o_proj.o_proj"),
    (re.compile(r"()rotary_emb$"), r"layers.0.self_attn.rotary_emb"),
)
_FUSED = {
    "q_proj": (("q_proj", "k_proj", "v_proj"), ("qkv_proj.Wqkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn")),
    "gate_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)),
}
_FUSED["k_proj"] = _FUSED["v_proj"] = _FUSED["q_proj"]
_FUSED["up_proj"] = _FUSED["gate_proj"]


@dataclass(frozen=True)
class Proposal:
    """A target site that may hold the same values as a reference site.

    Attributes:
        target: the site, with its canonical module path.
        score: how specific the rule is, from 0 to 1.
        reason: why it is proposed.
        parts: for fused targets, the canonical reference modules whose outputs it concatenates along the last axis,
            in order; empty otherwise.
    """

    target: Site
    score: float
    reason: str
    parts: tuple[str, ...] = ()


def canonical(module: str) -> str:
    """A module path without wrapping components: `model.layers.0.mlp` becomes `layers.0.mlp`."""
    parts = module.split(".")
    while parts and parts[0] in WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def proposals(site: Site) -> Iterator[Proposal]:
    """Target sites that may correspond to a reference site, best first.

    Args:
        site: the reference site, with its canonical module path.
    """
    for slot, score in _slots(site):
        yield Proposal(_at(site, site.module, slot), score, "same name")
    for pattern, replacement in _RENAMED:
        if pattern.match(site.module):
            module = pattern.sub(replacement, site.module)
            for slot, score in _slots(site):
                yield Proposal(_at(site, module, slot), 0.9 * score, f"known as {module}")
    prefix, _, leaf = site.module.rpartition(".")
    if leaf in _FUSED and site.slot in MAIN_SLOTS and site.port == "output":
        yield from _fused(site, prefix, leaf)


def _slots(site: Site) -> Iterator[tuple[str, float]]:
    """The slot itself, then other names of a main output; a root's first output is its logits."""
    yield site.slot, 1.0
    same = (*MAIN_SLOTS, "logits") if site.module == "" else MAIN_SLOTS
    if site.slot in same:
        yield from ((other, 0.95) for other in same if other != site.slot)


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


def _at(site: Site, module: str, slot: str) -> Site:
    return Site(module, site.port, slot, site.call)
