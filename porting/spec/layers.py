"""How a decoder layer is wired, and which layers differ from the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ...store.errors import InputError
from .architecture import Layer, NamedNorm, Node, Number, Term
from .evaluation import evaluate
from .expressions import Expressions
from .feed_forward import is_linear
from .mixture import is_mixture
from .norms import analyse_norm, is_norm
from .observation import Call, Observation, source_line
from .sources import Sources
from .wiring import Summand, explain

Case = TypeVar("Case")
Value = TypeVar("Value", bound=Hashable)
INPUT = "hidden_states"
#: Expressions of which layers are special; `layer_idx` counts from 0.
_CONDITIONS = (
    'config.layer_types[layer_idx] == "full_attention"',
    'config.layer_types[layer_idx] == "sliding_attention"',
    'config.layer_types[layer_idx] == "chunked_attention"',
    "config.no_rope_layers[layer_idx]",
    "not config.no_rope_layers[layer_idx]",
    "layer_idx < config.first_k_dense_replace",
    "layer_idx < config.moe_layer_start_index or (layer_idx + 1) % config.moe_layer_interval"
    " or config.moe_layer_end_index < layer_idx",
    "layer_idx in config.mlp_only_layers",
    "(layer_idx + 1) % config.decoder_sparse_step == 0",
    "layer_idx % 2 == 0",
    "layer_idx % 2 == 1",
)


def find_layers(model: Any, n_layers: int) -> str:
    """Path of the list of decoder layers.

    Raises:
        InputError: there is none with as many entries as the configuration says.
    """
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers and _has_children(module[0])
    ]
    if not found:
        raise InputError(f"unsupported: {type(model).__name__} has no list of {n_layers} layers")
    return str(min(found, key=lambda path: path.count(".")))


def _has_children(module: torch.nn.Module) -> bool:
    return any(list(child.children()) for child in module.children())


class LayerAnalysis:
    """Explains how the modules of one layer feed each other."""

    def __init__(self, seen: Observation, path: str, numbers: Expressions, sources: Sources) -> None:
        """Look at one layer.

        Args:
            seen: the observed model.
            path: of the layer.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
        """
        self._seen, self._path, self._numbers, self._sources = seen, path, numbers, sources
        self._module = seen.model.get_submodule(path)
        self.attention = self._attention_path()
        self.calls = [c for c in seen.children(path) if not _is_identity(c)]
        self.loose = [c for c in self.calls if is_linear(c.module) or _is_activation(c)]

    def _attention_path(self) -> str:
        inside = [p for p in self._seen.softmaxes if p.startswith(f"{self._path}.") and _is_scores(self._seen, p)]
        if len(inside) != 1:
            line = source_line(self._module, "def forward")
            raise InputError(
                f"unsupported: {len(inside)} modules of {type(self._module).__name__} at {self._path} ({line}) take a "
                "softmax over queries times keys, instead of one (state-space layers, linear attention and "
                "position biases such as ALiBi have no port)"
            )
        return inside[0]

    def feed_forward(self) -> tuple[str, list[Call]]:
        """Path and calls of the feed-forward block: a module of its own, or the layer's own projections."""
        if self.loose:
            return self._path, [c for c in self.loose if is_linear(c.module)]
        blocks = [c for c in self.calls if not is_norm(c.module) and not self.attention.startswith(c.path)]
        if len(blocks) != 1:
            names = ", ".join(c.path.rpartition(".")[2] for c in blocks) or "none"
            raise InputError(f"unsupported: feed-forward blocks in the layer {self._path}: {names}")
        return blocks[0].path, [c for c in self._seen.inside(blocks[0].path) if is_linear(c.module)]

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward block is a mixture of experts."""
        return is_mixture(self._seen.model.get_submodule(self.feed_forward()[0])) and not self.loose

    def run(self) -> Layer:
        """Explain the layer.

        Raises:
            InputError: a module is given something that is no sum of what was computed before.
        """
        whole = self._seen.call(self._path)
        known: dict[str, torch.Tensor] = {INPUT: whole.input}
        nodes: list[Node] = []
        norms: list[NamedNorm] = []
        for call in self.calls:
            name = call.path.rpartition(".")[2]
            role = "norm" if is_norm(call.module) else "attention" if self.attention.startswith(call.path) else ""
            if not role and call in self.loose:
                if call is not self.loose[0]:
                    known[_LOOSE] = call.output
                    continue
                name, role = _LOOSE, "feed_forward"
            line = source_line(self._module, f"self.{call.path.rpartition('.')[2]}(")
            terms = self._terms(call.input, known, name, line)
            nodes.append(Node(name, role or "feed_forward", terms, line))
            self._sources.add(f"layer.nodes.{name}", line)
            if role == "norm":
                field = f"layer.norms.{name}"
                shape = (call.input.shape[-1],)
                norm = analyse_norm(call.module, shape, self._numbers, self._sources, field, call.path)
                norms.append(NamedNorm(name, norm))
            known[name] = call.output
        output = self._terms(whole.output, known, "its output", source_line(self._module, "return"))
        self._sources.measured("layer.output", "the sum whose value is the layer's output")
        return Layer(type(self._module).__name__, self._path, tuple(norms), tuple(nodes), output)

    def _terms(self, tensor: torch.Tensor, known: Mapping[str, torch.Tensor], name: str, line: str) -> tuple[Term, ...]:
        sized = {key: value for key, value in known.items() if value.numel() == tensor.numel()}
        summands = explain(tensor, sized)
        if summands is None:
            kind = type(self._module).__name__
            raise InputError(f"unsupported: {name} of {kind} at {self._path} ({line}) is no sum of earlier outputs")
        return tuple(self._term(summand, name, line) for summand in summands)

    def _term(self, summand: Summand, name: str, line: str) -> Term:
        if summand.factor == 1.0:
            return Term(summand.name)
        factor = self._numbers.find(summand.factor, ("config.residual_multiplier",))
        if factor is None:
            raise InputError(
                f"unsupported: {name} of {self._path} ({line}) contains {summand.factor:.6g} times {summand.name}, "
                "a factor that no configuration key gives"
            )
        self._sources.number(f"layer.nodes.{name}.factor", factor, line)
        return Term(summand.name, factor)


#: Name of the feed-forward block of a layer whose projections are its own.
_LOOSE = "feed_forward"


def _is_scores(seen: Observation, path: str) -> bool:
    return any(softmax.left.ndim == 4 for softmax in seen.softmaxes[path])


def _is_identity(call: Call) -> bool:
    if not call.inputs or not call.outputs:
        return True
    return isinstance(call.module, (torch.nn.Dropout, torch.nn.Identity))


def _is_activation(call: Call) -> bool:
    module = call.module
    return not list(module.parameters()) and not list(module.children()) and not is_norm(module)


def cases_of(
    values: Sequence[Value], numbers: Expressions, what: str, build: Callable[[str, Value], Case]
) -> tuple[Case, ...]:
    """The cases that give every layer of the small model its value.

    Args:
        values: by layer.
        numbers: expressions over the configuration.
        what: in words, for the error.
        build: a case from its condition and value.

    Raises:
        InputError: no condition separates the layers.
    """
    kinds = list(dict.fromkeys(values))
    if len(kinds) == 1:
        return (build("", kinds[0]),)
    if len(kinds) == 2:
        for kind, other in (kinds, reversed(kinds)):
            wanted = [value == kind for value in values]
            for condition in _CONDITIONS:
                found = [_holds(condition, numbers.small, layer) for layer in range(len(values))]
                if found == wanted and _applies(condition, numbers.full):
                    return (build(condition, kind), build("", other))
    raise InputError(f"unsupported: {len(kinds)} kinds of {what} by layer, which no configuration key tells apart")


def _holds(condition: str, config: Any, layer: int) -> bool | None:
    """Whether a condition holds for a layer; None where the configuration lacks what it asks for."""
    try:
        return bool(evaluate(condition, {"config": config, "layer_idx": layer}))
    except (AttributeError, TypeError, IndexError):
        return None


def _applies(condition: str, config: Any) -> bool:
    return all(_holds(condition, config, layer) is not None for layer in range(config.num_hidden_layers))


def factor_of(number: Number | None) -> float:
    """A factor's value, 1 without one."""
    return 1.0 if number is None else number.value
