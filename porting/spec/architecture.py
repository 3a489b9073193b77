"""What an architecture is: the facts a port is generated from, each with the place it was read or measured.

Sizes are `Number`s: a Python expression over the model's configuration and its value for the analysed model, so that
one port serves every size of the architecture. What differs between layers is a tuple of cases; the first whose
condition holds for a layer (`config` and `layer_idx` are in scope) applies, and the last has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Version of the document; a reader refuses others.
VERSION = 1


class Fact:
    """Base of everything a spec is made of."""


@dataclass(frozen=True)
class Number(Fact):
    """A number of the architecture.

    Attributes:
        expression: Python over `config`, for example `config.rms_norm_eps` or `1e-05`.
        value: what it is for the analysed model.
    """

    expression: str
    value: float


@dataclass(frozen=True)
class Norm(Fact):
    """A normalisation over the last axis.

    Attributes:
        kind: `rms` (y = x / sqrt(mean(x^2) + eps)) or `layer` (mean subtracted first).
        eps: epsilon inside the root.
        offset: added to the weight: 1 where the checkpoint stores w and the model multiplies by 1 + w.
        weight: whether there is a weight.
        bias: whether there is a bias.
        rounding: where a model in low precision rounds: `normalized` (before the weight), `product` (after it), or
            `native` (as torch's layer_norm).
    """

    kind: str
    eps: Number
    offset: float
    weight: bool
    bias: bool
    rounding: str


@dataclass(frozen=True)
class QueryKeyNorm(Fact):
    """Normalised queries and keys.

    Attributes:
        query: module of the queries' norm, relative to the attention.
        key: module of the keys' norm.
        norm: the norm.
        scope: `head` (one weight for all heads), `heads` (a weight per head, normalised per head) or `width` (over all
            heads together).
        after_rotary: whether it follows the rotary embedding.
        list_name: name of the list of norms, where every head has a module of its own; else empty.
    """

    query: str
    key: str
    norm: Norm
    scope: str
    after_rotary: bool = False
    list_name: str = ""


@dataclass(frozen=True)
class Rotary(Fact):
    """A rotary embedding.

    Attributes:
        kind: how frequencies follow from the base: `default`, `linear`, `llama3`, `yarn`, `longrope`.
        theta: the base.
        dim: how many features of a head are rotated, the first ones.
        layout: which features form a pair: `half` (i and i + dim/2) or `interleaved` (2i and 2i + 1).
        scaling: expression of the dictionary with the scaling's parameters, empty for `default`.
        factor: factor on cosine and sine; 1 but for yarn and longrope.
    """

    kind: str
    theta: Number
    dim: Number
    layout: str
    scaling: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class RotaryCase(Fact):
    """The rotary embedding of the layers for which `condition` holds; None where positions are not encoded."""

    condition: str
    rotary: Rotary | None


@dataclass(frozen=True)
class MaskCase(Fact):
    """What the layers for which `condition` holds may attend to.

    Attributes:
        condition: which layers.
        kind: `causal`, `window` (the last `size` positions, the own one included) or `chunk` (the own chunk of `size`).
        size: of window or chunk.
    """

    condition: str
    kind: str
    size: Number | None = None


@dataclass(frozen=True)
class Latent(Fact):
    """Keys and values through a low-rank latent (multi-head latent attention).

    Queries and keys have a part without positions and a rotated part; the rotated part of keys is one for all heads.

    Attributes:
        query_down: projection of queries to their latent; empty where `query_up` takes the hidden states.
        query_norm: norm module of the queries' latent; empty without.
        query_up: projection to the heads' queries, each the plain part, then the rotated part.
        down: projection to the latent, then the rotated part of keys.
        norm_module: norm module of the latent.
        norm: the norms.
        up: projection of the latent to every head's plain part of keys, then values.
        rank: width of the latent.
        query_rank: width of the queries' latent, None without.
        plain: features of a head's part without positions.
        rotated: features of the rotated part.
        value: features of a head's values.
        down_bias: whether the projections to latents have a bias.
    """

    query_down: str
    query_norm: str
    query_up: str
    down: str
    norm_module: str
    norm: Norm
    up: str
    rank: Number
    query_rank: Number | None
    plain: Number
    rotated: Number
    value: Number
    down_bias: bool


@dataclass(frozen=True)
class Attention(Fact):
    """Self-attention.

    Attributes:
        module: its name in a layer.
        class_name: class in transformers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: features of a head.
        layout: `separate` projections, or one with rows `plain` (queries, keys, values) or `grouped` (for every KV head
            its queries, its key, its value), or `latent`.
        projections: modules of queries, keys and values, or of the one projection.
        output: module of the output projection.
        qkv_bias: whether queries, keys and values have a bias.
        output_bias: whether the output projection has one.
        transposed: whether weights are stored input first (Conv1D).
        scale: factor on the scores.
        rotary: by layer.
        mask: by layer.
        query_key_norm: None without.
        softcap: scores are softcap * tanh(score / softcap); None without.
        clip: queries, keys and values are clamped to +-clip; None without.
        sinks: parameter with one score per head that takes part in the softmax only; empty without.
        latent: what `latent` projections are; None for other layouts.
    """

    module: str
    class_name: str
    heads: Number
    kv_heads: Number
    head_dim: Number
    layout: str
    projections: tuple[str, ...]
    output: str
    qkv_bias: tuple[bool, ...]
    output_bias: bool
    transposed: bool
    scale: Number
    rotary: tuple[RotaryCase, ...]
    mask: tuple[MaskCase, ...]
    query_key_norm: QueryKeyNorm | None = None
    softcap: Number | None = None
    clip: Number | None = None
    sinks: str = ""
    latent: Latent | None = None


@dataclass(frozen=True)
class FeedForward(Fact):
    """A dense feed-forward block.

    Attributes:
        module: its name in a layer; empty where its projections are the layer's own.
        class_name: class in transformers.
        kind: `gated` (down(act(gate(x)) * up(x))) or `plain` (down(act(up(x)))).
        activation: expression of the activation's name in transformers.
        activation_name: that name.
        intermediate: width between.
        gate: module of the gate; the same as `up` where one projection holds both.
        up: module of the other factor.
        down: module of the output.
        layout: `separate`, or which rows of the one projection come first: `gate_first`, `up_first`.
        up_bias: whether gate and up have biases.
        down_bias: whether the output has one.
        transposed: whether weights are stored input first (Conv1D).
        activation_module: module of the activation; empty where a function is called.
    """

    module: str
    class_name: str
    kind: str
    activation: str
    activation_name: str
    intermediate: Number
    gate: str
    up: str
    down: str
    layout: str
    up_bias: bool
    down_bias: bool
    transposed: bool
    activation_module: str = ""


@dataclass(frozen=True)
class Router(Fact):
    """How a token's experts are chosen and weighted.

    Attributes:
        module: the module with the weight of the scores, relative to the block.
        bias: whether scores have a bias.
        scores: `softmax` or `sigmoid` of the projection, or `sparsemixer` (a softmax over near ties, expert by expert).
        after_top_k: whether the softmax is taken over the chosen experts only.
        normalized: whether the chosen weights are divided by their sum.
        n_experts: number of experts.
        top_k: chosen per token.
        scale: factor on the weights, None without.
        correction: tensor that is added to scores for choosing only, relative to `module`; empty without.
        groups: number of groups of experts of which only the best are open; None without.
        open_groups: number of open groups.
        group_score: what ranks groups: `max` (best expert) or `top2` (sum of the best two).
        jitter: sparsemixer: half the relative distance of a near tie; None for others.
    """

    module: str
    bias: bool
    scores: str
    after_top_k: bool
    normalized: bool
    n_experts: Number
    top_k: Number
    scale: Number | None = None
    correction: str = ""
    groups: Number | None = None
    open_groups: Number | None = None
    group_score: str = ""
    jitter: Number | None = None


@dataclass(frozen=True)
class Experts(Fact):
    """The experts' weights.

    Attributes:
        stored: `modules` (one per expert), `rows` (one tensor: expert, output, input) or `columns` (expert, input,
            output).
        module: the list of experts, or the module that holds the tensors; empty for the block itself.
        gate: name of the gate's weight; with `up` the same where one holds both.
        up: of the other factor.
        down: of the output.
        layout: `separate`, or which of one weight's outputs are the gate's: `gate_first`, `up_first`, `interleaved`.
        bias: suffix of the biases' names, empty without.
        formula: `gated` (act(gate) * up) or `clamped` (gate and up clamped, gate * sigmoid(1.702 gate) * (up + 1)).
        activation: expression of the activation's name.
        activation_name: that name.
        intermediate: width of an expert.
    """

    stored: str
    module: str
    gate: str
    up: str
    down: str
    layout: str
    bias: str
    formula: str
    activation: str
    activation_name: str
    intermediate: Number


@dataclass(frozen=True)
class SharedExpert(Fact):
    """A block that every token passes, added to what the experts give.

    Attributes:
        block: the block.
        gate: module of a sigmoid gate on its output; empty without.
    """

    block: FeedForward
    gate: str


@dataclass(frozen=True)
class MixtureOfExperts(Fact):
    """A feed-forward block of which every token uses a few experts."""

    module: str
    class_name: str
    router: Router
    experts: Experts
    shared: SharedExpert | None


@dataclass(frozen=True)
class FeedForwardCase(Fact):
    """The feed-forward block of the layers for which `condition` holds: a dense one, or experts."""

    condition: str
    block: FeedForward | None
    experts: MixtureOfExperts | None = None


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
    sources: tuple[Source, ...] = field(default=(), repr=False)
    version: int = VERSION
