"""Inputs that have a module's name in both models and are not the same thing.

What a module returns is fixed by what it is; what it is given is a choice of the implementation. A rotary embedding,
for example, gets a tensor only to learn its dtype, in one library the hidden states and in another the values' heads.
Such an input is not a fault: a really wrong input shows in the output that it came from, and in what is made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .pairs import Gap, SiteMapping
from .sites import Site, SiteInfo


def without_other_inputs(
    mapping: SiteMapping, reference: Sequence[SiteInfo], target: Sequence[SiteInfo]
) -> SiteMapping:
    """Account for input pairs, found by name, that hold other things; both runs' sites tell how wide they are."""
    widths = {info.site: info.features for info in reference}, {info.site: info.features for info in target}
    dropped = {}
    for pair in mapping.pairs:
        ours, theirs = widths[0].get(pair.reference), widths[1].get(pair.target)
        if pair.reference.port != "input" or pair.transform != "identity":
            continue
        if _tells_only_dtype(pair.reference) and pair.reference.module != pair.target.module:
            dropped[pair] = Gap(
                pair.reference, "skipped", "a rotary embedding takes nothing but dtype and device from it"
            )
        elif ours and theirs and ours != theirs:
            reason = f"{pair.target.name} is another tensor: {theirs} elements per position instead of {ours}"
            dropped[pair] = Gap(pair.reference, "skipped", reason)
    kept = tuple(pair for pair in mapping.pairs if pair not in dropped)
    return replace(mapping, pairs=kept, gaps=(*mapping.gaps, *dict.fromkeys(dropped.values())))


def _tells_only_dtype(site: Site) -> bool:
    """Whether a site is the tensor that a rotary embedding gets besides positions."""
    return "rotary" in site.module.rpartition(".")[2] and site.slot in ("0", "x", "hidden_states")
