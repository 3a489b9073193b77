"""Which modules of a port hold the values of which modules of its model: what the generator knows beyond names."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from ..generator.conversion import block_names
from ..generator.mixture_plan import target_of
from ..spec.architecture import Architecture, FeedForward, MixtureOfExperts

_WEIGHTS = "the port returns no attention weights"
_CHOICES = "chosen experts and weights; the port is compared by scores and by the block's output"
#: Routers return up to this many tensors.
_ROUTER_OUTPUTS = 5


def component_mapping(spec: Architecture, n_layers: int, recorded: Collection[tuple[str, str]]) -> dict[str, Any]:
    """A component mapping for a comparison of the model with its port.

    Args:
        spec: the architecture.
        n_layers: layers of the model that was run.
        recorded: module and slot of every site that the reference has.

    Returns:
        The document of a component_mapping.json; entries whose source was not recorded are left out.
    """
    modules = {module for module, _ in recorded}
    entries, reasons = [], []
    for source, target, reason in _pairs(spec, n_layers):
        module, bracket, rest = source.partition("[")
        if (module, rest.rstrip("]")) in recorded if bracket else source in modules:
            entries.append([[source.removesuffix("[]")], [target] if target else []])
            reasons.append(reason)
    return {"mapping_size": len(entries), "component_mapping": entries, "variables": {}, "reasoning": reasons}


def component_mapping_text(spec: Architecture, n_layers: int, recorded: Collection[tuple[str, str]]) -> str:
    """The same as JSON."""
    return json.dumps(component_mapping(spec, n_layers, recorded), indent=1)


def _pairs(spec: Architecture, n_layers: int) -> Iterator[tuple[str, str, str]]:
    """Source, target (empty for none) and why."""
    head = spec.head
    yield spec.embedding.module, "embed_tokens", "the embedding"
    if spec.embedding.positions is not None:
        module = spec.embedding.positions.module
        yield module, module.rpartition(".")[2], "learned positions"
    yield head.norm_module, "norm", "the final norm"
    if head.scale is not None or head.softcap is not None:
        yield head.module, "", "the port scales or bounds logits in its projection: they are compared as logits"
    elif head.module.rpartition(".")[2] != "lm_head":
        yield head.module, "", "the port projects the last position only: it is compared as logits"
    for layer in range(n_layers):
        source, target = f"{spec.layer.path}.{layer}", f"layers.{layer}"
        yield source, target, "the layer"
        for named in spec.layer.norms:
            yield f"{source}.{named.name}", f"{target}.{named.name}", "a norm"
        attention = spec.attention.module
        yield f"{source}.{attention}[1]", "", _WEIGHTS
        yield f"{source}.{attention}.{spec.attention.output}", f"{target}.{attention}.o_proj", "the output projection"
        yield from _of_block(spec, source, target)


def _of_block(spec: Architecture, source: str, target: str) -> Iterator[tuple[str, str, str]]:
    for case in spec.feed_forward:
        if case.experts is not None:
            yield from _of_experts(case.experts, source, target)
        elif case.block is not None:
            yield from _of_dense(case.block, source, target)


def _of_experts(mixture: MixtureOfExperts, source: str, target: str) -> Iterator[tuple[str, str, str]]:
    block = f"{source}.{mixture.module}"
    router = f"{block}.{mixture.router.module}"
    yield f"{router}[]", f"{target}.{target_of(mixture)}.router.linear_router", "the router"
    for slot in range(_ROUTER_OUTPUTS):
        yield f"{router}[{slot}]", "", _CHOICES
        outer = router.rpartition(".")[0]
        if outer != block:
            yield f"{outer}[{slot}]", "", _CHOICES
    yield f"{block}[1]", "", _CHOICES
    inside = f"{block}.{mixture.experts.module}".rstrip(".")
    if inside != block:
        yield inside, "", "experts alone: the port returns what all ranks' experts add up to"


def parts_of_experts(spec: Architecture) -> Iterator[str]:
    """Globs of modules that compute single experts: ports compute all at once."""
    for case in spec.feed_forward:
        if case.experts is not None:
            inside = f"{spec.layer.path}.*.{case.experts.module}"
            experts = case.experts.experts
            names = {experts.module} if experts.module else {n.partition(".")[0] for n in (experts.up, experts.down)}
            yield from (f"{inside}.{name}.*" if experts.stored == "modules" else f"{inside}.{name}" for name in names)


def _of_dense(block: FeedForward, source: str, target: str) -> Iterator[tuple[str, str, str]]:
    if block.module:
        source, target = f"{source}.{block.module}", f"{target}.{block.module}"
        yield source, target, "the feed-forward block"
    else:
        target = f"{target}.mlp"
    names = block_names(block)
    yield f"{source}.{block.down}", f"{target}.{names[-1]}", "its output"
    if block.layout == "separate":
        if block.gate:
            yield f"{source}.{block.gate}", f"{target}.{names[0]}", "its gate"
        yield f"{source}.{block.up}", f"{target}.{names[-2]}", "its other factor"
