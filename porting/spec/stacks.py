"""The encoder or the decoder of an encoder-decoder: its layers, explained by values, and what stands around them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...store.errors import InputError
from .architecture import Norm
from .encoder_decoder_facts import RelativePositions, Stack
from .expressions import Expressions
from .layers import find_layers
from .norms import analyse_norm, is_norm
from .observation import Observation, source_line
from .relative_positions import find_positions
from .sources import PartSources, Sources
from .stack_layers import StackLayerAnalysis
from .wiring import same

_LAYERS = ("config.num_layers", "config.num_decoder_layers", "config.num_hidden_layers")


@dataclass(frozen=True)
class StackFound:
    """A stack, and the parameters that it accounts for, by name in the model."""

    stack: Stack
    claims: frozenset[str]


class StackAnalysis:
    """Analyses one stack."""

    def __init__(self, seen: Observation, path: str, numbers: Expressions, sources: Sources, name: str) -> None:
        """Look at one stack.

        Args:
            seen: the observed model.
            path: of the stack.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
            name: of the stack in the spec.
        """
        self._seen, self._path, self._numbers = seen, path, numbers
        self._module = seen.model.get_submodule(path)
        self._sources = PartSources(sources, name)
        self._cross_sources = PartSources(sources, name, ("attention", "cross"))
        self._claims: set[str] = set()

    def run(self, tokens: torch.Tensor, memory: torch.Tensor | None) -> StackFound:
        """Explain the stack.

        Args:
            tokens: what it was given.
            memory: what the encoder returned; None for the encoder itself.

        Raises:
            InputError: a step is none that is understood.
        """
        inside = find_layers(self._module, _n_layers(self._module))
        layers = f"{self._path}.{inside}"
        n_layers = len(self._seen.model.get_submodule(layers))
        number = self._numbers.find(n_layers, _LAYERS, only=True)
        if number is None:
            raise self._fail(f"{n_layers} layers, which no configuration key gives")
        found = [self._layer(f"{layers}.{n}") for n in range(n_layers)]
        parts = [layer.parts(memory) for layer in found]
        for n, part in enumerate(parts):
            if part.comparable != parts[0].comparable:
                raise self._fail(f"layer {n} that differs from layer 0")
        positions = self._positions(found)
        norm_module, norm = self._norm(layers, n_layers)
        first = parts[0]
        stack = Stack(
            path=self._path,
            class_name=type(self._module).__name__,
            embedding=self._embedding(layers, tokens),
            n_layers=number,
            layer=replace(first.layer, path=layers),
            attention=first.attention,
            cross=first.cross,
            positions=positions,
            feed_forward=first.feed_forward,
            norm_module=norm_module,
            norm=norm,
        )
        self._add_classes(found[0], stack)
        return StackFound(stack, frozenset(self._claims.union(*(layer.claims for layer in found))))

    def _layer(self, path: str) -> StackLayerAnalysis:
        return StackLayerAnalysis(self._seen, path, self._numbers, self._sources, self._cross_sources)

    def _fail(self, what: str) -> InputError:
        line = source_line(self._module, "def forward")
        return InputError(f"unsupported: {what} in {type(self._module).__name__} at {self._path} ({line})")

    def _embedding(self, layers: str, tokens: torch.Tensor) -> str:
        """The table of the tokens, by the name that the checkpoint has for it."""
        first = self._seen.call(f"{layers}.0")
        tables = [
            c
            for c in self._seen.inside(self._path)
            if isinstance(c.module, torch.nn.Embedding) and c.order < first.order
        ]
        for call in tables:
            if same(torch.nn.functional.embedding(tokens, call.module.weight), first.input):
                pointer = call.module.weight.data_ptr()
                names = [n for n, p in self._seen.model.named_parameters() if p.data_ptr() == pointer]
                line = source_line(self._module, "embed_tokens(")
                self._sources.measured("embedding", "the first layer's input is the tokens' rows", line)
                self._claims.update(names)
                return str(names[0]).removesuffix(".weight")
        raise self._fail("a first layer whose input is not the tokens' embedding alone (learned positions, a factor?)")

    def _norm(self, layers: str, n_layers: int) -> tuple[str, Norm]:
        last = self._seen.call(f"{layers}.{n_layers - 1}")
        whole = self._seen.call(self._path)
        after = [
            c
            for c in self._seen.inside(self._path)
            if c.order > last.order and is_norm(c.module) and not c.path.startswith(f"{layers}.")
        ]
        if len(after) != 1 or not same(after[0].input, last.output) or not same(after[0].output, whole.output):
            raise self._fail("something else than one norm after the last layer")
        (call,) = after
        shape = (call.input.shape[-1],)
        norm = analyse_norm(call.module, shape, self._numbers, self._sources, "norm", call.path)
        self._claims.update(f"{call.path}.{kind}" for kind in ("weight", "bias"))
        self._sources.add("norm_module", source_line(self._module, f"self.{call.path.rpartition('.')[2]}("))
        return call.path, norm

    def _positions(self, layers: list[StackLayerAnalysis]) -> RelativePositions | None:
        """The bias of self-attention: the first layer's for all, or every layer's own."""
        biases = [layer.self_attention.bias for layer in layers]
        given = [bias for bias in biases if bias is not None]
        if not given:
            return None
        if len(given) < len(biases):
            raise self._fail("a bias on the scores of some layers only")
        owners = [layer for layer in layers if layer.self_attention.tables]
        shared = owners == layers[:1]
        if not shared and owners != layers:
            raise self._fail("a bias on scores that some layers share")
        found = {self._table(layers[0 if shared else n], bias) for n, bias in enumerate(given)}
        if len(found) != 1 or None in found:
            raise self._fail("a bias on scores that no table of distances gives (ALiBi?)")
        (positions,) = found
        assert positions is not None
        self._sources.measured("positions.shared", "which layers have a table")
        self._claims.update(f"{layer.attention}.{positions.module}.weight" for layer in owners)
        return replace(positions, shared=shared)

    def _table(self, owner: StackLayerAnalysis, bias: torch.Tensor) -> RelativePositions | None:
        tables = owner.self_attention.tables
        return find_positions(self._seen, owner.attention, tables, bias, self._numbers, self._sources)

    def _add_classes(self, layer: StackLayerAnalysis, stack: Stack) -> None:
        model = self._seen.model
        parts = {
            "path": self._path,
            "class_name": self._path,
            "layer": layer.path,
            "attention": layer.attention,
            "cross": layer.cross,
            "feed_forward": f"{layer.path}.{stack.feed_forward.module}",
        }
        for field, path in parts.items():
            if path:
                module = model.get_submodule(path)
                self._sources.add(field, source_line(module, f"class {type(module).__name__}"))


def _n_layers(stack: torch.nn.Module) -> int:
    lists = [m for m in stack.children() if isinstance(m, torch.nn.ModuleList)]
    return max((len(m) for m in lists), default=0)
