"""What differs between a model and its port: by nature of a port, or as a bug would.

Expected differences are those of NxD Inference's building blocks (sharded projections, the attention framework, rotary
embeddings per layer, rank and cache modules). Everything else is a suspect: a module that is missing, extra, nested
elsewhere or of another size, another number of layers, a missing or different activation, another epsilon.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...analyze.naming import canonical
from .counterparts import TreeMapping
from .tree import ModuleNode

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_ACTIVATIONS = re.compile(r"(SiLU|GELU|ReLU|Sigmoid|Tanh|Mish|Hardswish|SwiGLU)", re.IGNORECASE)
_EPSILON = ("eps", "variance_epsilon", "rms_norm_eps")
_NOTHING = frozenset({"Dropout", "Identity", "ModuleList"})
#: Classes of the target that the source has no counterpart of, and why.
_FRAMEWORK = (
    (re.compile(r"SPMDRank$"), "number of the rank, for tensor parallelism"),
    (re.compile(r"KVCacheManager$|^ParameterList$"), "the key-value cache is part of the model"),
    (re.compile(r"^GroupQueryAttention_(QKV|O)$"), "attention framework of NxD Inference"),
    (re.compile(r"Sampler$"), "sampling on the device"),
    (re.compile(r"^(MoE|Router\w*|ExpertMLPs\w*|Experts|Expert\w+Linear)$"), "experts computed together"),
    (re.compile(r"RotaryEmbedding$|^.*Rotary.*$"), "rotary embedding per layer"),
)
_CLASS_CHANGES = (
    (r"^Linear$|^Conv1D$", r"(Column|Row)ParallelLinear$", "tensor-parallel sharding"),
    (r"^Embedding$", r"ParallelEmbedding$", "embedding sharded over ranks"),
    (r"RMSNorm$", r"RMSNorm$", "normalization of the framework"),
    (r"^LayerNorm$", r"LayerNorm$", "normalization of the framework"),
    (r"Linear$|Router$", r"^Linear$|Router\w*$", "router of the framework"),
    (r"RotaryEmbedding$", r"Rotary\w*$", "rotary embedding per layer"),
)


@dataclass(frozen=True)
class Difference:
    """One difference, of one module or of those that are alike in every layer.

    Attributes:
        kind: `class`, `fused`, `split`, `framework`, `unused`, `missing`, `extra`, `nesting`, `size`, `layers`,
            `activation`, `epsilon`.
        expected: whether ports have it by nature.
        source: path in the source, with `*` for layer numbers; empty if there is none.
        target: path in the target, likewise.
        reason: what differs, and why that is expected or suspect.
        count: number of modules.
    """

    kind: str
    expected: bool
    source: str
    target: str
    reason: str
    count: int = 1

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dict(vars(self))


def find_differences(source: ModuleNode, target: ModuleNode, mapping: TreeMapping) -> list[Difference]:
    """All differences of two trees, suspects first.

    Args:
        source: tree of the Hugging Face model.
        target: tree of the port.
        mapping: which of their modules correspond.
    """
    search = _Search(source, target, mapping)
    found = [
        *search.layers(),
        *search.missing(),
        *search.extra(),
        *search.activations(),
        *search.changed(),
    ]
    merged: dict[tuple[str, bool, str, str, str], int] = defaultdict(int)
    for item in found:
        merged[item.kind, item.expected, _starred(item.source), _starred(item.target), _starred(item.reason)] += (
            item.count
        )
    return sorted((Difference(*key, count) for key, count in merged.items()), key=lambda item: item.expected)


def explained_mapping(mapping: TreeMapping, differences: Sequence[Difference]) -> dict[str, Any]:
    """The component mapping with the reasons of modules without a counterpart; read by `sleuth compare --mapping`."""
    body = mapping.as_component_mapping()
    reasons = {item.source or item.target: item for item in differences if not (item.source and item.target)}
    for number, (first, second) in enumerate(body["component_mapping"]):
        if first and second:
            continue
        (path,) = first or second
        item = reasons.get(_starred(re.sub(r"\{\w+\}", "0", path)))
        if item is not None:
            word = "expected" if item.expected else "suspect"
            body["reasoning"][number] = f"{word}: {item.reason}"
        elif first and canonical(path) == "":
            body["reasoning"][number] = "expected: the port's model has no such level"
    return body


class _Search:
    def __init__(self, source: ModuleNode, target: ModuleNode, mapping: TreeMapping) -> None:
        self._source = {node.path: node for node in source.walk()}
        self._target = {node.path: node for node in target.walk()}
        self._pairs = mapping.pairs
        self._paired = {path for path, _ in self._pairs}
        self._taken = {path for _, path in self._pairs}
        self._skipped = {gap.site.module: gap.reason for gap in mapping.mapping.gaps if gap.status == "skipped"}

    def layers(self) -> Iterator[Difference]:
        """Stacks of another depth."""
        counts = [_stacks(nodes) for nodes in (self._source, self._target)]
        for name in sorted(set(counts[0]) & set(counts[1])):
            (path, own), (other, theirs) = counts[0][name], counts[1][name]
            if own != theirs:
                yield Difference("layers", False, path, other, f"{own} layers in the source, {theirs} in the target")

    def missing(self) -> Iterator[Difference]:
        """Source modules without a counterpart: unused, computed elsewhere, nested elsewhere, or missing."""
        for path, node in self._source.items():
            if not path or path in self._paired or node.children or node.cls in _NOTHING:
                continue
            if path in self._skipped:
                yield Difference("framework", True, path, "", self._skipped[path])
            elif not _inside_stack(path, self._target):
                continue  # a missing layer is reported once, as a number of layers
            elif _is_activation(node):
                continue
            elif "otary" in node.cls:
                if not any("otary" in other.cls for other in self._target.values()):
                    yield Difference("missing", False, path, "", f"{node.cls} has no counterpart")
            elif (elsewhere := self._elsewhere(path)) is not None:
                reason = f"{path} is nested elsewhere in the target, as {elsewhere}"
                yield Difference("nesting", False, path, elsewhere, reason)
            elif expert := self._experts(path):
                yield Difference("framework", True, path, expert, "experts computed together")
            else:
                yield Difference("missing", False, path, "", f"{node.cls} of the source has no counterpart")

    def _elsewhere(self, path: str) -> str | None:
        """A free target module with the same name under another parent of the same layer."""
        prefix, leaf = canonical(path).rpartition(".")[::2]
        layer = re.match(r"(.*?\.\d+)(\.|$)", prefix + ".")
        for other in self._target:
            if other.rpartition(".")[2] != leaf or other in self._taken:
                continue
            if canonical(other).rpartition(".")[0] != prefix and (
                layer is None or canonical(other).startswith(layer[1])
            ):
                return other
        return None

    def _experts(self, path: str) -> str:
        match = re.match(r"(.*\.)(block_sparse_moe|mlp|feed_forward)\.experts(\.|$)", canonical(path))
        if match is None:
            return ""
        return next(
            (other for other, node in self._target.items() if other.startswith(match[1]) and "xpert" in node.cls), ""
        )

    def extra(self) -> Iterator[Difference]:
        """Target modules without a counterpart: of the framework, or extra."""
        reasons: dict[str, str] = {}
        for path, node in self._target.items():
            if not path or path in self._taken:
                continue
            parent = path.rpartition(".")[0]
            reason = next((why for pattern, why in _FRAMEWORK if pattern.search(node.cls)), reasons.get(parent, ""))
            if reason:
                reasons[path] = reason
                yield Difference("framework", True, "", path, f"{node.cls}: {reason}")
            elif node.children or _is_activation(node) or node.cls in _NOTHING:
                continue
            elif _inside_stack(path, self._source) and self._moved(path) is None:
                yield Difference("extra", False, "", path, f"{node.cls} of the target has no counterpart in the source")

    def _moved(self, path: str) -> str | None:
        """The source module that `missing` reports as nested elsewhere in this one's place."""
        leaf = path.rpartition(".")[2]
        return next(
            (
                other
                for other in self._source
                if other.rpartition(".")[2] == leaf and other not in self._paired and self._elsewhere(other) == path
            ),
            None,
        )

    def changed(self) -> Iterator[Difference]:
        """Pairs whose classes, sizes or constants differ."""
        for path, other in self._pairs:
            source, target = self._source[path], self._target[other]
            first, second = source.parameters.get("weight"), target.parameters.get("weight")
            fused = self._pairs.count((path, other)) and [p for p, o in self._pairs if o == other]
            if first and second and fused and len(fused) == 1 and sorted(first) != sorted(second):
                reason = f"weight {list(first)} in the source, {list(second)} in the target"
                yield Difference("size", False, path, other, reason)
            elif fused and len(fused) > 1 and not target.children:
                yield Difference("fused", True, path, other, f"{target.cls} holds {len(fused)} modules of the source")
            elif source.cls != target.cls and first is not None:
                reason = next(
                    (w for a, b, w in _CLASS_CHANGES if re.search(a, source.cls) and re.search(b, target.cls)), ""
                )
                text = f"{source.cls} is {target.cls}" + (f": {reason}" if reason else "")
                yield Difference("class", True, path, other, text)
            bias = ("bias" in source.parameters, "bias" in target.parameters)
            if first and second and bias[0] != bias[1]:
                which = "source" if bias[0] else "target"
                yield Difference("size", False, path, other, f"only the {which} has a bias")
            yield from _epsilon(path, other, source, target)

    def activations(self) -> Iterator[Difference]:
        """Activation functions: those of the source must be somewhere in the counterpart of their parent."""
        parents = dict(self._pairs)
        for path, node in self._source.items():
            if not _is_activation(node) or not _inside_stack(path, self._target):
                continue
            parent = path.rpartition(".")[0]
            while parent and parent not in parents:
                parent = parent.rpartition(".")[0]
            other = parents.get(parent, "")
            target = self._target.get(other)
            if target is None or re.search(r"\.experts(\.|$)", path):
                continue
            found = [name for name in map(_activation_of, target.walk()) if name]
            if not found:
                yield Difference(
                    "activation", False, path, other, f"{node.cls} of the source is nowhere in {target.cls}"
                )
            elif _kind(node.cls) not in {_kind(name) for name in found}:
                yield Difference(
                    "activation", False, path, other, f"{node.cls} in the source, {found[0]} in the target"
                )


def _stacks(nodes: dict[str, ModuleNode]) -> dict[str, tuple[str, int]]:
    """Canonical path of every list of modules, with its path and length; experts are no layers."""
    return {
        canonical(path): (path, len(node.children))
        for path, node in nodes.items()
        if node.cls == "ModuleList" and not path.endswith("experts")
    }


def _inside_stack(path: str, other: dict[str, ModuleNode]) -> bool:
    """Whether the layer that a module is in exists on the other side too (true outside layers)."""
    match = re.match(r"(.*?\.\d+)(\.|$)", canonical(path))
    return match is None or any(canonical(name) == match[1] for name in other)


def _is_activation(node: ModuleNode) -> bool:
    return not node.children and not node.parameters and bool(_ACTIVATIONS.search(node.cls))


def _activation_of(node: ModuleNode) -> str:
    """The activation that a module is, or has as an attribute."""
    if _is_activation(node):
        return node.cls
    names = (node.attributes.get(name) for name in ("act_fn", "hidden_act", "activation", "activation_fn", "act"))
    return next((str(name) for name in names if isinstance(name, str)), "")


def _kind(name: str) -> str:
    """What function an activation is: variants of one formula differ."""
    text = re.sub(r"activation|_|\d+$", "", name.lower())
    text = {
        "swish": "silu",
        "geluactivation": "gelu",
        "gelupytorchtanh": "gelutanh",
        "pytorchgelutanh": "gelutanh",
    }.get(text, text)
    return {"newgelu": "gelutanh", "fastgelu": "gelutanh", "gelunew": "gelutanh", "gelufast": "gelutanh"}.get(
        text, text
    )


def _epsilon(path: str, other: str, source: ModuleNode, target: ModuleNode) -> Iterator[Difference]:
    first, second = (next((n.attributes[e] for e in _EPSILON if e in n.attributes), None) for n in (source, target))
    if "Norm" in source.cls and first is not None and second is not None and first != second:
        yield Difference("epsilon", False, path, other, f"epsilon {first} in the source, {second} in the target")


def _starred(text: str) -> str:
    return _NUMBER.sub("*", text)
