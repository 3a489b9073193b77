"""What an encoder-decoder is: two stacks of layers, and how the second looks at the first."""

from __future__ import annotations

from dataclasses import dataclass, field

from .architecture import VERSION, Architecture, Layer, Source
from .attention_facts import Attention
from .facts import Fact, Norm, Number
from .feed_forward_facts import FeedForward


@dataclass(frozen=True)
class RelativePositions(Fact):
    """A learned bias on the scores of self-attention, by head and by bucket of the distance from query to key.

    With d = key - query, buckets are those of Raffel et al. (2020), "Exploring the Limits of Transfer Learning": half
    of them hold one distance each, the others grow with its logarithm up to `max_distance`, beyond which all is one.
    `bidirectional` gives keys after the query buckets of their own; else they are in the bucket of d = 0.

    Attributes:
        module: the table, relative to the attention.
        buckets: rows of the table.
        max_distance: from where on all distances are one.
        bidirectional: whether the sign of the distance counts.
        shared: whether the first layer's table serves all layers; else every layer has one.
    """

    module: str
    buckets: Number
    max_distance: Number
    bidirectional: bool
    shared: bool


@dataclass(frozen=True)
class Stack(Fact):
    """The encoder, or the decoder.

    Attributes:
        path: its module.
        class_name: its class in transformers.
        embedding: the table of its tokens, by the name that the checkpoint has for it.
        n_layers: number of layers.
        layer: how a layer is wired; nodes have the roles `norm`, `attention`, `cross_attention` and `feed_forward`.
        attention: its self-attention; its mask is `full` in the encoder.
        cross: attention to what the encoder returned, whose mask is the source's; None in the encoder.
        positions: bias of self-attention; None without.
        feed_forward: its feed-forward block.
        norm_module: the norm after the last layer.
        norm: that norm.
    """

    path: str
    class_name: str
    embedding: str
    n_layers: Number
    layer: Layer
    attention: Attention
    cross: Attention | None
    positions: RelativePositions | None
    feed_forward: FeedForward
    norm_module: str
    norm: Norm


@dataclass(frozen=True)
class Projection(Fact):
    """From the decoder's output to logits.

    Attributes:
        module: the projection.
        bias: whether it has one.
        tied: whether its weight is the embedding's.
        factor: factor on its input, None without.
    """

    module: str
    bias: bool
    tied: bool
    factor: Number | None = None


@dataclass(frozen=True)
class EncoderDecoder(Fact):
    """Everything the port of an encoder-decoder is generated from.

    Attributes:
        model_type: of the configuration.
        class_name: the model in transformers.
        config_class: its configuration.
        module_name: module of transformers that defines it.
        hidden: width of the residual stream.
        vocabulary: number of token ids.
        encoder: reads the source.
        decoder: writes, looking at what the encoder returned.
        head: the output side.
        ignored: patterns of checkpoint keys that carry nothing.
        sources: where every field comes from.
        version: of this document.
    """

    model_type: str
    class_name: str
    config_class: str
    module_name: str
    hidden: Number
    vocabulary: Number
    encoder: Stack
    decoder: Stack
    head: Projection
    ignored: tuple[str, ...] = ()
    sources: tuple[Source, ...] = field(default=(), repr=False)
    version: int = VERSION

    @property
    def summary(self) -> str:
        """Its main traits in words."""
        layer = self.decoder.layer
        positions = "relative positions" if self.decoder.positions is not None else "no positions"
        return f"encoder-decoder, {layer.placement}-normed, {layer.residual} residual, {positions}"

    @property
    def stacks(self) -> tuple[tuple[str, Stack], ...]:
        """Both, by name."""
        return ("encoder", self.encoder), ("decoder", self.decoder)


#: What a port is generated from.
AnyArchitecture = Architecture | EncoderDecoder
