"""Which modules of a port hold the values of which modules of its model: what the generator knows beyond names."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..generator.conversion import block_names
from ..generator.mixture_plan import target_of
from ..spec.architecture import Architecture, FeedForward, MixtureOfExperts
from ..spec.expressions import Expressions

_WEIGHTS = "the port returns no attention weights"
_COPIES = "the port gives every query head a KV head: the first copy of each"
_PADDING = "the port pads the vocabulary to a multiple of the ranks"
_TABLES = "rotary tables that differ by layer, or may hold pairs in another order, are compared by what they make"
_ROOT = "(root)"
_CHOICES = "chosen experts and weights; the port is compared by scores and by the block's output"
#: Routers return up to this many tensors.
_ROUTER_OUTPUTS = 5


@dataclass(frozen=True)
class Sizes:
    """Of the model that is compared, and the number of ranks: what ranges of features follow from."""

    n_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tp: int

    @property
    def copies(self) -> list[list[int]]:
        """Features of keys (and values) in the port that are each KV head's first copy."""
        size = self.head_dim
        return [[head * size, (head + 1) * size] for head in range(0, self.kv_heads * self.repeats, self.repeats)]

    @property
    def repeats(self) -> int:
        """How often the port holds every KV head, where it gives every query head its own."""
        divides = self.kv_heads % self.tp == 0 or self.tp % self.kv_heads == 0
        return 1 if divides else self.heads // self.kv_heads


def sizes_of(spec: Architecture, config: Any, tp: int) -> Sizes:
    """The sizes of a configuration."""
    numbers = Expressions(config, config)
    attention = spec.attention
    heads, kv_heads, head_dim = (
        int(numbers.value(number.expression)) for number in (attention.heads, attention.kv_heads, attention.head_dim)
    )
    vocabulary = int(numbers.value(spec.vocabulary.expression))
    return Sizes(int(config.num_hidden_layers), heads, kv_heads, head_dim, vocabulary, tp)


@dataclass(frozen=True)
class Entry:
    """A source, its target (empty for none), why, and ranges of features by side."""

    source: str
    target: str
    reason: str
    ranges: dict[str, list[list[int]]] | None = None


def component_mapping(spec: Architecture, sizes: Sizes, recorded: Collection[tuple[str, str]]) -> dict[str, Any]:
    """A component mapping for a comparison of the model with its port.

    Args:
        spec: the architecture.
        sizes: of the model that was run.
        recorded: module and slot of every site that the reference has.

    Returns:
        The document of a component_mapping.json; entries whose source was not recorded are left out.
    """
    pairs = map(_plain, _pairs(spec, sizes.n_layers))
    return mapping_of((*pairs, *_fused(spec, sizes), *_repeated(spec, sizes), *_padded(spec, sizes)), recorded)


def mapping_of(entries_given: Iterable[Entry], recorded: Collection[tuple[str, str]]) -> dict[str, Any]:
    """The document of a component_mapping.json; entries whose source was not recorded are left out.

    Args:
        entries_given: what is known.
        recorded: module and slot of every site that the reference has.
    """
    modules = {module for module, _ in recorded}
    entries, reasons, transforms = [], [], []
    for entry in entries_given:
        module, bracket, rest = entry.source.removeprefix(_ROOT).partition("[")
        if (module, rest.rstrip("]")) in recorded if bracket else entry.source in modules:
            entries.append([[entry.source.removesuffix("[]")], [entry.target] if entry.target else []])
            reasons.append(entry.reason)
            transforms.append(entry.ranges)
    return {
        "mapping_size": len(entries),
        "component_mapping": entries,
        "variables": {},
        "reasoning": reasons,
        "transforms": transforms,
    }


def component_mapping_text(spec: Architecture, sizes: Sizes, recorded: Collection[tuple[str, str]]) -> str:
    """The same as JSON."""
    return json.dumps(component_mapping(spec, sizes, recorded), indent=1)


def _plain(pair: tuple[str, str, str]) -> Entry:
    return Entry(*pair)


def _fused(spec: Architecture, sizes: Sizes) -> Iterator[Entry]:
    """The parts of a fused projection: queries, keys and values."""
    attention = spec.attention
    if attention.layout not in ("plain", "grouped"):
        return
    size, group = sizes.head_dim, sizes.heads // sizes.kv_heads
    first: list[Sequence[int]]
    if attention.layout == "plain":
        first = [range(sizes.heads), *(range(start, start + sizes.kv_heads) for start in _starts(sizes))]
    else:
        step = group + 2
        first = [
            [j * step + i for j in range(sizes.kv_heads) for i in range(group)],
            [j * step + group for j in range(sizes.kv_heads)],
            [j * step + group + 1 for j in range(sizes.kv_heads)],
        ]
    for layer in range(sizes.n_layers):
        source = f"{spec.layer.path}.{layer}.{attention.module}.{attention.projections[0]}"
        for part, (name, heads) in enumerate(zip(("q_proj", "k_proj", "v_proj"), first, strict=True)):
            ranges = {"reference": [[head * size, (head + 1) * size] for head in heads]}
            if part and sizes.repeats > 1:
                ranges["target"] = sizes.copies
            target = f"layers.{layer}.{attention.module}.qkv_proj.{name}"
            yield Entry(source, target, "a part of the fused projection", ranges)


def _repeated(spec: Architecture, sizes: Sizes) -> Iterator[Entry]:
    """Keys and values of which the port holds copies: in low precision, values alone do not tell."""
    attention = spec.attention
    if sizes.repeats == 1 or attention.layout != "separate" or attention.latent is not None:
        return
    norm = attention.query_key_norm
    for layer in range(sizes.n_layers):
        source, target = f"{spec.layer.path}.{layer}.{attention.module}", f"layers.{layer}.{attention.module}"
        pairs = [(attention.projections[n], f"qkv_proj.{name}") for n, name in ((1, "k_proj"), (2, "v_proj"))]
        if norm is not None and norm.scope == "head" and not norm.after_rotary:
            pairs.append((norm.key, "k_layernorm"))
        for one, other in pairs:
            yield Entry(f"{source}.{one}", f"{target}.{other}", _COPIES, {"target": sizes.copies})


def _padded(spec: Architecture, sizes: Sizes) -> Iterator[Entry]:
    """Logits beside which the port has those of tokens that do not exist."""
    if sizes.vocabulary % sizes.tp == 0:
        return
    ranges = {"target": [[0, sizes.vocabulary]]}
    if spec.head.scale is None and spec.head.softcap is None and spec.head.module == "lm_head":
        yield Entry("lm_head", "lm_head", _PADDING, ranges)
    yield Entry(f"{_ROOT}[logits]", f"{_ROOT}[0]", _PADDING, ranges)


def _starts(sizes: Sizes) -> tuple[int, int]:
    return sizes.heads, sizes.heads + sizes.kv_heads


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
    rotary = [case.rotary for case in spec.attention.rotary if case.rotary is not None]
    if len(rotary) > 1 or any(one.layout == "interleaved" for one in rotary):
        base = spec.layer.path.rpartition(".")[0]
        for name in ("rotary_emb", "rotary_emb_local"):
            yield from ((f"{base}.{name}{slot}", "", _TABLES) for slot in ("[0]", "[1]", "[]"))
    for layer in range(n_layers):
        source, target = f"{spec.layer.path}.{layer}", f"layers.{layer}"
        yield source, target, "the layer"
        for named in spec.layer.norms:
            yield f"{source}.{named.name}", f"{target}.{named.name}", "a norm"
        attention = spec.attention.module
        yield f"{source}.{attention}[1]", "", _WEIGHTS
        yield f"{source}[1]", "", _WEIGHTS
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
    if block.activation_module not in ("", "act_fn"):
        yield f"{source}.{block.activation_module}", f"{target}.act_fn", "its activation"
    yield f"{source}.{block.down}", f"{target}.{names[-1]}", "its output"
    if block.layout == "separate":
        if block.gate:
            yield f"{source}.{block.gate}", f"{target}.{names[0]}", "its gate"
        yield f"{source}.{block.up}", f"{target}.{names[-2]}", "its other factor"
