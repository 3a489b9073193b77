"""Pairs of experts that are modules of their own with experts that the target computes in one.

NxD's experts are one fused module; taps of it hold what each token's experts computed, with their numbers. An expert
of the reference, and each module within it, is compared with the values of that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .naming import FUSED_EXPERTS, MAIN_SLOTS, canonical
from .pairs import Gap, Pair, SiteMapping
from .routed_tokens import Expert
from .sites import SiteInfo

#: What a module within an expert returns, and what it is given, by its name: slots of the target's taps.
_RETURNS = {
    "": "experts_down",
    "w1": "experts_gate",
    "gate_proj": "experts_gate",
    "w3": "experts_up",
    "up_proj": "experts_up",
    "act_fn": "experts_act",
    "w2": "experts_down",
    "down_proj": "experts_down",
}
_TAKES = {"act_fn": "experts_gate", "w2": "experts_product", "down_proj": "experts_product"}
_TAKES_TOKENS = ("", "w1", "w3", "gate_proj", "up_proj")


def with_fused_experts(mapping: SiteMapping, reference: Sequence[SiteInfo], target: Sequence[SiteInfo]) -> SiteMapping:
    """The mapping with pairs for what it skipped: experts of the reference whose rows are known by token.

    Args:
        mapping: of the reference and the target.
        reference: sites of the reference; those that have positions can be compared.
        target: sites of the target.
    """
    known = {info.site: info for info in reference if info.positioned}
    there: dict[str, dict[tuple[str, str], SiteInfo]] = {}
    for info in target:
        by_slot = there.setdefault(canonical(info.site.module), {})
        by_slot.setdefault((info.site.port, info.site.slot), info)
    pairs: list[Pair] = []
    gaps: list[Gap] = []
    for gap in mapping.gaps:
        one = known.get(gap.site)
        pair = None if one is None or gap.final else _pair(one, there)
        if pair is None:
            gaps.append(gap)
        else:
            pairs.append(pair)
    return replace(mapping, pairs=(*mapping.pairs, *pairs), gaps=tuple(gaps)) if pairs else mapping


def _pair(info: SiteInfo, there: dict[str, dict[tuple[str, str], SiteInfo]]) -> Pair | None:
    expert = Expert.of(canonical(info.site.module))
    if expert is None or info.site.call or info.site.slot not in MAIN_SLOTS:
        return None
    prefix = expert.block.rpartition(".")[0]
    for name in FUSED_EXPERTS:
        sites = there.get(f"{prefix}.{name}" if prefix else name, {})
        if info.site.port == "input" and expert.part in _TAKES_TOKENS:
            given = next((sites[key] for key in (("input", "0"), ("input", "hidden_states")) if key in sites), None)
            if given is not None and given.features == info.features:
                return Pair(info.site, given.site, None, 0.9, "what the target's experts are given")
            continue
        tap = sites.get(("tap", (_TAKES if info.site.port == "input" else _RETURNS).get(expert.part, "")))
        if tap is not None and ("tap", "experts") in sites and not tap.lacking and not tap.n_statistics_only:
            reason = f"expert {expert.number} of the target's fused experts"
            return Pair(info.site, tap.site, None, 0.9, reason, expert=expert.number)
    return None
