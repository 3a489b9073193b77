"""Scaled dot-product attention over recorded queries, keys and values, with everything that can go wrong as a setting.

Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245; softcap: Gemma 2,
arXiv:2408.00118; sinks: Xiao et al. 2023, arXiv:2309.17453 (a learned logit per head, as in GPT-OSS).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .runs import FloatArray, IntArray

HALF, PAIRS, BACKWARDS, UNROTATED = "half", "pairs", "backwards", "none"
NEIGHBOURS, ROUNDS = "neighbours", "rounds"
_HIDDEN = -np.inf


@dataclass(frozen=True)
class Shape:
    """Numbers of heads, and the size of one."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Attention:
    """How attention is computed.

    Attributes:
        shape: of the heads.
        scale: factor on the scores.
        softcap: c tanh(scores / c), or None.
        sinks: a logit per head that takes part in the softmax, or None.
        ahead: the last key that a query sees, relative to its position; None: it sees all keys.
        window: number of keys that it sees at most, counted from its own; None: no limit.
        rotation: how queries and keys are rotated.
        query_shift, key_shift: positions by which their rotations are off.
        repeat: how query heads share KV heads.
        forget: keys from the first on that nobody sees.
        decoded: what became of the keys and values that decode steps write: `kept`, `zero_keys`, `zero_values`, `zero`,
            `unseen` (nobody but their own token sees them), `own_unseen` (their own token does not see them),
            `late_keys`, `late_values`, `late` (each slot holds what belongs into the one before) or `overwritten` (the
            first decoded token took the place of the prompt's last).
        low: a dtype to which scores and weights are rounded, or None.
        rotated: leading dimensions of a head that are rotated, None for as many as cosine and sine have.
        strided: with `rotated`, frequencies are spread over these dimensions instead of cut off.
        once: cosine and sine are given once per pair of dimensions.
        relaid: cosine and sine, given for the other pairing, are laid out anew for this one.
    """

    shape: Shape
    scale: float
    softcap: float | None = None
    sinks: FloatArray | None = None
    ahead: int | None = 0
    window: int | None = None
    rotation: str = HALF
    query_shift: int = 0
    key_shift: int = 0
    repeat: str = NEIGHBOURS
    forget: int = 0
    decoded: str = "kept"
    low: object = None
    rotated: int | None = None
    strided: bool = False
    once: bool = False
    relaid: bool = False


@dataclass(frozen=True)
class Sequence:
    """What attention needs of one prompt.

    Attributes:
        query: `[rows, heads head_dim]`, of the tokens whose output is wanted.
        positions: of these rows.
        key, value: `[positions, kv_heads head_dim]`, from position 0 on.
        cos, sin: `[positions, rotated]`, None without rotary embedding.
        prompt_length: tokens before the first decode step.
    """

    query: FloatArray
    positions: IntArray
    key: FloatArray
    value: FloatArray
    cos: FloatArray | None
    sin: FloatArray | None
    prompt_length: int


def attend(law: Attention, sequence: Sequence) -> FloatArray:
    """Outputs of all heads side by side, before the output projection: `[rows, heads head_dim]`.

    A row whose query sees no key is NaN: what a port makes of it depends on the value that hides keys.
    """
    shape, n = law.shape, len(sequence.query)
    query = sequence.query.reshape(n, shape.heads, shape.head_dim)
    key = sequence.key.reshape(len(sequence.key), shape.kv_heads, shape.head_dim)
    value = sequence.value.reshape(key.shape)
    if sequence.cos is not None and sequence.sin is not None and law.rotation != UNROTATED:
        query = _rotate(query, sequence, sequence.positions + law.query_shift, law)
        key = _rotate(key, sequence, np.arange(len(key)) + law.key_shift, law)
    decoded = np.arange(len(key)) >= sequence.prompt_length
    key = _cached(law.decoded, "keys", key, sequence.prompt_length)
    value = _cached(law.decoded, "values", value, sequence.prompt_length)
    hidden = ~_visible(law, sequence.positions, len(key), decoded)
    blind = hidden.all(axis=1)
    hidden[blind] = False
    mixed = np.empty((n, shape.heads, shape.head_dim))
    for head in range(shape.heads):
        shared = head % shape.kv_heads if law.repeat == ROUNDS else head * shape.kv_heads // shape.heads
        scores = query[:, head] @ key[:, shared].T * law.scale
        mixed[:, head] = _softmax(law, head, _rounded(scores, law), hidden) @ value[:, shared]
    mixed[blind] = np.nan
    return mixed.reshape(n, -1)


def _cached(law: str, what: str, slots: FloatArray, prompt: int) -> FloatArray:
    """Keys or values as decode steps find them in the cache, `[positions, kv_heads, head_dim]`."""
    if law in ("zero", f"zero_{what}"):
        return np.where(np.arange(len(slots))[:, None, None] >= prompt, 0.0, slots)
    if law in ("late", f"late_{what}") and prompt > 0:
        return np.concatenate([slots[:prompt], slots[prompt - 1 : -1]])
    if law == "overwritten" and 0 < prompt < len(slots):
        return np.concatenate([slots[: prompt - 1], slots[prompt : prompt + 1], slots[prompt:]])
    return slots


def _visible(law: Attention, positions: IntArray, n_keys: int, decoded: np.ndarray) -> np.ndarray:
    keys = np.arange(n_keys)
    distance = positions[:, None] - keys
    seen = np.ones(distance.shape, bool) if law.ahead is None else distance >= -law.ahead
    if law.window is not None:
        seen &= distance < law.window
    seen &= keys >= law.forget
    if law.decoded == "unseen":
        seen &= ~decoded | (distance == 0)
    if law.decoded == "own_unseen":
        seen &= ~(decoded & (distance == 0))
    return np.asarray(seen)


def _softmax(law: Attention, head: int, scores: FloatArray, hidden: np.ndarray) -> FloatArray:
    if law.softcap is not None:
        scores = law.softcap * np.tanh(scores / law.softcap)
    scores = np.where(hidden, _HIDDEN, scores)
    peak = scores.max(axis=1, keepdims=True)
    sink = None if law.sinks is None else law.sinks[head]
    if sink is not None:
        peak = np.maximum(peak, sink)
    weights = _rounded(np.exp(scores - peak), law)
    total = weights.sum(axis=1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - peak)
    return _rounded(weights / total, law)


def _rounded(values: FloatArray, law: Attention) -> FloatArray:
    if law.low is None:
        return values
    return np.asarray(values.astype(ml_dtypes.bfloat16 if law.low == "bfloat16" else np.float16).astype(np.float64))


def _rotate(heads: FloatArray, sequence: Sequence, at: IntArray, law: Attention) -> FloatArray:
    """Turn `[tokens, n, head_dim]` by the angles of positions; positions outside are clipped to the ends."""
    if sequence.cos is None or sequence.sin is None:
        return heads
    rows = np.clip(at, 0, len(sequence.cos) - 1)
    cos, sin = _angles(sequence.cos[rows], heads, law), _angles(sequence.sin[rows], heads, law)
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    if law.rotation == PAIRS:
        other = np.stack([-turned[..., 1::2], turned[..., ::2]], axis=-1).reshape(turned.shape)
    else:
        left, right = np.split(turned, 2, axis=-1)
        other = np.concatenate([-right, left], axis=-1)
    sign = -1.0 if law.rotation == BACKWARDS else 1.0
    return np.concatenate([turned * cos + sign * other * sin, rest], axis=-1)


def _angles(values: FloatArray, heads: FloatArray, law: Attention) -> FloatArray:
    """Cosine or sine for the rotated dimensions, `[tokens, 1, rotated]`, given once per pair or once per dimension."""
    size, kept = heads.shape[-1], values
    if law.rotated is not None and law.rotated < size:
        half = values if law.once else values[:, : values.shape[-1] // 2]
        kept = half[:, :: half.shape[1] // (law.rotated // 2)] if law.strided else half[:, : law.rotated // 2]
    elif law.relaid:
        kept = values[:, : values.shape[-1] // 2] if law.rotation == PAIRS else values[:, ::2]
    elif not (law.once and values.shape[-1] * 2 <= size):
        return np.asarray(values[:, None, :size])
    kept = np.repeat(kept, 2, axis=-1) if law.rotation == PAIRS else np.concatenate([kept, kept], axis=-1)
    return np.asarray(kept[:, None])
