"""A decoder layer of a port: its modules and the statements of its forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..spec.architecture import Architecture, Number, Term
from .norm_plan import norm_constructor


def layer_plan(spec: Architecture, stem: str, attention: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    index = ", layer_idx" if attention["per_layer"] else ""
    modules = []
    norms = {named.name: named.norm for named in spec.layer.norms}
    for node in spec.layer.nodes:
        if node.role == "norm":
            modules.append(f"self.{node.name} = {norm_constructor(norms[node.name], 'config.hidden_size', stem)}")
        elif node.role == "attention":
            modules.append(f"self.{node.name} = Neuron{stem}Attention(config{index})")
        else:
            modules.extend(block["constructor"])
    terms = [term for node in spec.layer.nodes for term in node.terms] + list(spec.layer.output)
    factors = dict.fromkeys(term.factor for term in terms if term.factor is not None)
    modules.extend(f"self.{_attribute(factor)} = {factor.expression}" for factor in factors)
    return {
        "modules": modules,
        "forward": list(_forward(spec, block)),
        "per_layer": attention["per_layer"] or block["per_layer"],
        "own_rotary": attention["own_rotary"],
    }


def _forward(spec: Architecture, block: dict[str, Any]) -> Iterator[str]:
    """Statements that compute a layer, one per module and one per sum."""
    values = LayerValues()
    for node in spec.layer.nodes:
        yield from values.named_sum(node.terms)
        given = values.text(node.terms)
        if node.role == "attention":
            yield f"attention = self.{node.name}("
            yield f"    {given},"
            for argument in ("attention_mask", "position_ids", "past_key_value"):
                yield f"    {argument}={argument},"
            yield "    **kwargs,"
            yield ")"
            values.names[node.name] = "attention.hidden_states"
            continue
        values.names[node.name] = f"after_{node.name}"
        called = block["name"] if node.role == "feed_forward" else node.name
        extra, first = (block["extra"], block["first"]) if node.role == "feed_forward" else ("", "")
        yield f"{values.names[node.name]} = self.{called}({given}{extra}){first}"
    yield f"hidden_states = {values.text(spec.layer.output)}"


class LayerValues:
    """What a layer's statements have computed so far.

    Attributes:
        names: expression of the output of every node.
    """

    def __init__(self) -> None:
        """The layer's input is all there is."""
        self.names = {"hidden_states": "hidden_states"}
        self._sums: dict[tuple[Term, ...], str] = {}

    def named_sum(self, terms: tuple[Term, ...]) -> Iterator[str]:
        """The statement that gives a sum a name; none where it has one, or is no sum."""
        if len(terms) > 1 and terms not in self._sums:
            name = "residual" if not self._sums else f"residual_{len(self._sums) + 1}"
            yield f"{name} = {self.text(terms)}"
            self._sums[terms] = name

    def text(self, terms: tuple[Term, ...]) -> str:
        """A sum as an expression."""
        if terms in self._sums:
            return self._sums[terms]
        parts = []
        rest = list(terms)
        for known in sorted(self._sums, key=len, reverse=True):
            if all(term in rest for term in known):
                rest = [term for term in rest if term not in known]
                parts.append(self._sums[known])
                break
        for term in rest:
            name = self.names[term.node]
            parts.append(name if term.factor is None else f"{name} * self.{_attribute(term.factor)}")
        return " + ".join(parts)


def _attribute(number: Number) -> str:
    return number.expression.removeprefix("config.")
