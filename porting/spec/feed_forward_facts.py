"""Facts about feed-forward blocks, dense ones and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Fact, Number


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
        correction: tensor that is added to scores for choosing only; empty without.
        correction_module: module that holds it, relative to the block; empty where `module` does.
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
    correction_module: str = ""
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
