"""How a decoder layer is wired, and which layers differ from the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

from ...store.errors import InputError
from .architecture import Number
from .evaluation import evaluate
from .expressions import Expressions
from .feed_forward import is_linear
from .layer_wiring import LayerWiring, Step
from .mixture import is_mixture
from .norms import is_norm
from .observation import Call, Observation, source_line

Case = TypeVar("Case")
Value = TypeVar("Value", bound=Hashable)
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


class LayerAnalysis(LayerWiring):
    """Explains how the modules of one layer feed each other."""

    @cached_property
    def calls(self) -> list[Call]:
        """Calls of the layer's own modules."""
        return [c for c in self._seen.children(self._path) if not _is_identity(c)]

    @cached_property
    def loose(self) -> list[Call]:
        """Those that are projections and activations of the layer itself."""
        return [c for c in self.calls if is_linear(c.module) or _is_activation(c)]

    @cached_property
    def attention(self) -> str:
        """Path of the module that takes a softmax over queries times keys.

        Raises:
            InputError: there is none, or more than one.
        """
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

    def _steps(self) -> Iterator[Step]:
        for call in self.calls:
            name = call.path.rpartition(".")[2]
            role = "norm" if is_norm(call.module) else "attention" if self.attention.startswith(call.path) else ""
            line = source_line(self._module, f"self.{name}(")
            if role or call not in self.loose:
                yield Step(call, name, role or "feed_forward", line)
            else:
                yield Step(call, _LOOSE, "feed_forward", line, goes_on=call is not self.loose[0])


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
