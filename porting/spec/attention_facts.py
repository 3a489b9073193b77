"""Facts about self-attention."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Fact, Norm, Number


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
