"""What an architecture is: the facts a port is generated from, each with the place it was read or measured.

Sizes are `Number`s: a Python expression over the model's configuration and its value for the analysed model, so that
one port serves every size of the architecture. What differs between layers is a tuple of cases; the first whose
condition holds for a layer (`config` and `layer_idx` are in scope) applies, and the last has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .attention_facts import Attention as Attention
from .attention_facts import Latent as Latent
from .attention_facts import MaskCase as MaskCase
from .attention_facts import QueryKeyNorm as QueryKeyNorm
from .attention_facts import Rotary as Rotary
from .attention_facts import RotaryCase as RotaryCase
from .facts import Fact as Fact
from .facts import Norm as Norm
from .facts import Number as Number
from .feed_forward_facts import Experts as Experts
from .feed_forward_facts import FeedForward as FeedForward
from .feed_forward_facts import FeedForwardCase as FeedForwardCase
from .feed_forward_facts import MixtureOfExperts as MixtureOfExperts
from .feed_forward_facts import Router as Router
from .feed_forward_facts import SharedExpert as SharedExpert
from .packing import Packing as Packing

#: Version of the document; a reader refuses others.
VERSION = 1


@dataclass(frozen=True)
class Term(Fact):
    """A summand: the output of a node (`hidden_states`: the layer's input) times a factor."""

    node: str
    factor: Number | None = None


@dataclass(frozen=True)
class Node(Fact):
    """A module of a layer and the sum it is given.

    Attributes:
        name: module in the layer.
        role: `norm`, `attention`, `feed_forward`.
        terms: its input, in the order in which it is added up.
        source: where in transformers it is called.
    """

    name: str
    role: str
    terms: tuple[Term, ...]
    source: str = ""


@dataclass(frozen=True)
class NamedNorm(Fact):
    """A norm of a layer by its module name."""

    name: str
    norm: Norm


@dataclass(frozen=True)
class Layer(Fact):
    """A decoder layer: its modules in the order in which they are called, and the sum that it returns."""

    class_name: str
    path: str
    norms: tuple[NamedNorm, ...]
    nodes: tuple[Node, ...]
    output: tuple[Term, ...]

    @property
    def placement(self) -> str:
        """Where norms stand, in the usual words."""
        normed = {node.name for node in self.nodes if node.role == "norm"}
        blocks = [node for node in self.nodes if node.role != "norm"]
        before = [any(term.node in normed for term in node.terms) for node in blocks]
        inside = {
            term.node for node in self.nodes if node.role == "norm" for term in node.terms if len(node.terms) == 1
        }
        after = [node.name in inside for node in blocks]
        words = [word for word, found in (("pre", all(before)), ("post", all(after))) if found]
        return "+".join(words) or "mixed"

    @property
    def residual(self) -> str:
        """`parallel` where attention and feed-forward block see the same residual, else `sequential`."""
        attention = {node.name for node in self.nodes if node.role == "attention"}
        reached = {"hidden_states": False}
        for node in self.nodes:
            reached[node.name] = node.name in attention or any(reached[term.node] for term in node.terms)
            if node.role == "feed_forward":
                return "sequential" if reached[node.name] else "parallel"
        return "sequential"


@dataclass(frozen=True)
class Positions(Fact):
    """Learned positions: a table that is looked up at the token's position plus an offset."""

    module: str
    offset: int
    rows: Number


@dataclass(frozen=True)
class Embedding(Fact):
    """From token ids to the first layer's input.

    Attributes:
        module: the table.
        factor: factor on the embedding, None without.
        factor_rounded: whether the factor is rounded to the model's precision first.
        in_module: whether the table's module itself multiplies.
        positions: learned positions, None without.
    """

    module: str
    factor: Number | None = None
    factor_rounded: bool = False
    in_module: bool = False
    positions: Positions | None = None


@dataclass(frozen=True)
class Head(Fact):
    """From the last layer's output to logits.

    Attributes:
        norm_module: the final norm's module.
        norm: the final norm.
        module: the projection.
        bias: whether it has one.
        tied: whether its weight is the embedding's.
        scale: factor on logits, None without.
        softcap: logits are softcap * tanh(logits / softcap); None without.
    """

    norm_module: str
    norm: Norm
    module: str
    bias: bool
    tied: bool
    scale: Number | None = None
    softcap: Number | None = None


@dataclass(frozen=True)
class Source(Fact):
    """Where a field comes from.

    Attributes:
        field: dotted path of the field in the spec.
        origin: `config: KEY`, `checkpoint: KEY`, `FILE:LINE` of transformers, or `measured: ...`, joined by `; `.
    """

    field: str
    origin: str


@dataclass(frozen=True)
class Architecture(Fact):
    """Everything a port is generated from.

    Attributes:
        model_type: of the configuration.
        class_name: the causal language model in transformers.
        config_class: its configuration.
        module_name: module of transformers that defines it.
        prefix: what precedes the base model's weights in a checkpoint.
        hidden: width of the residual stream.
        n_layers: number of layers.
        vocabulary: number of token ids.
        embedding: the input side.
        layer: how a layer is wired.
        attention: its attention.
        feed_forward: its feed-forward block, by layer.
        head: the output side.
        ignored: patterns of checkpoint keys that carry nothing (buffers that are computed).
        packing: how the checkpoint's weights are packed, None where they are plain.
        sources: where every field comes from.
        version: of this document.
    """

    model_type: str
    class_name: str
    config_class: str
    module_name: str
    prefix: str
    hidden: Number
    n_layers: Number
    vocabulary: Number
    embedding: Embedding
    layer: Layer
    attention: Attention
    feed_forward: tuple[FeedForwardCase, ...]
    head: Head
    ignored: tuple[str, ...] = ()
    packing: Packing | None = None
    sources: tuple[Source, ...] = field(default=(), repr=False)
    version: int = VERSION

    @property
    def summary(self) -> str:
        """Its main traits in words."""
        return f"{self.layer.placement}-normed, {self.layer.residual} residual"
