"""How the modules of a layer feed each other: every input is a sum of what was computed before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...store.errors import InputError
from .architecture import Layer, NamedNorm, Node, Term
from .expressions import Expressions
from .norms import analyse_norm
from .observation import Call, Observation, source_line
from .sources import Sources
from .wiring import Summand, explain

#: Name of a layer's input in sums.
INPUT = "hidden_states"


@dataclass(frozen=True)
class Step:
    """A module that a layer calls.

    Attributes:
        call: the observed call.
        name: of the node it becomes.
        role: of the node.
        line: where the source calls it.
        goes_on: it goes on with the node before it, whose output is its own.
    """

    call: Call
    name: str
    role: str
    line: str
    goes_on: bool = False


class LayerWiring(ABC):
    """Explains how the modules of one layer feed each other; subclasses say which modules count."""

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

    @abstractmethod
    def _steps(self) -> Iterable[Step]:
        """The modules in the order in which they are called."""

    def run(self) -> Layer:
        """Explain the layer.

        Raises:
            InputError: a module is given something that is no sum of what was computed before.
        """
        whole = self._seen.call(self._path)
        known: dict[str, torch.Tensor] = {INPUT: whole.input}
        nodes: list[Node] = []
        norms: list[NamedNorm] = []
        for step in self._steps():
            call, name = step.call, step.name
            if not step.goes_on:
                nodes.append(Node(name, step.role, self._terms(call.input, known, name, step.line), step.line))
                self._sources.add(f"layer.nodes.{name}", step.line)
            if step.role == "norm":
                field, shape = f"layer.norms.{name}", (call.input.shape[-1],)
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
