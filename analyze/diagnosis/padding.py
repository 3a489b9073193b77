"""Padding that queries see: every head mixes in one more value, that of the padding, which no trace holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .hypothesis import PATTERN, Prediction
from .runs import FloatArray
from .scene import Scene

#: Rounds of alternating least squares after the start, which solves for the nearest point of many lines.
_ROUNDS = 8
#: How far outside of 0 and 1 a fitted share may lie, at the 1st and 99th percentile of the rows that count.
_SLACK = 0.05
#: Rows count as affected when their error is so many times the noise; values of padding are no smaller than this share
#: of the usual ones, else it is rather the denominator of the softmax that is off.
_AFFECTED, _NOT_ZERO = 3.0, 0.1


def seen_padding(scene: Scene, right: FloatArray, kv_heads: int, head_dim: int) -> Iterator[Prediction]:
    """t = (1 - a) r + a v with a share a per token and head, and one v per KV head.

    All padding of a batch is one token, so that its value in the first layer is the same everywhere.

    Args:
        scene: the input of an output projection.
        right: attention as it should be, `[tokens, heads head_dim]`.
        kv_heads: key and value heads.
        head_dim: size of a head.
    """
    if not _padded(scene):
        return
    n = len(right)
    r, t = (values.reshape(n, kv_heads, -1, head_dim).swapaxes(1, 2) for values in (right, scene.target))
    r, t = (values.reshape(-1, kv_heads, head_dim) for values in (r, t))
    shares, values = np.empty(r.shape[:2]), np.empty((kv_heads, head_dim))
    for head in range(kv_heads):
        shares[:, head], values[head] = _mixed_in(r[:, head], t[:, head])
    error = np.linalg.norm(t - r, axis=2)
    affected = error > _AFFECTED * scene.noise * np.linalg.norm(r, axis=2)
    if affected.sum() < 4 * kv_heads or np.linalg.norm(values) < _NOT_ZERO * np.sqrt(np.square(r).sum(2).mean(0).sum()):
        return
    low, high = np.percentile(shares[affected], [1, 99])
    if low < -_SLACK or high > 1 + _SLACK:
        return
    kept = np.clip(shares, 0.0, 1.0)[..., None]
    mixed = ((1 - kept) * r + kept * values).reshape(n, -1, kv_heads, head_dim).swapaxes(1, 2)
    yield Prediction(
        "padding_mask",
        mixed.reshape(right.shape),
        f"attention sees padding: up to {high:.0%} of what a head returns is one value that no token of the prompt has",
        "mask padded positions in prefill and in decode, on the side on which the port pads",
        PATTERN,
        shares.size + values.size,
        {"mean_share": float(shares[affected].mean()), "affected": float(affected.mean())},
    )


def _padded(scene: Scene) -> bool:
    """Whether the prompts with errors are shorter than the longest of their batch; true where batches are unknown."""
    manifest = scene.runs.trace.manifest(scene.runs.target)
    told = manifest.provenance.get("generation")
    size = told.get("batch_size") if isinstance(told, dict) else None
    if not isinstance(size, int):
        return True
    lengths = {prompt.prompt: prompt.n_tokens for prompt in manifest.prompts}
    order = sorted(lengths)
    short = set()
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = max(lengths[prompt] for prompt in batch)
        short |= {prompt for prompt in batch if lengths[prompt] < longest}
    error = np.linalg.norm(scene.target - scene.reference, axis=1)
    wrong = error > _AFFECTED * scene.noise * np.linalg.norm(scene.reference, axis=1)
    return bool(wrong.any()) and bool(np.isin(scene.rows.prompts[wrong], list(short)).mean() >= 1 - _SLACK)


def _mixed_in(r: FloatArray, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The point v that rows move towards, and how far each goes: `[rows]` and `[head_dim]`."""
    moved = t - r
    square = np.square(moved).sum(axis=1)
    # Each row lies on a line through r and t. The point nearest to all lines solves sum of P (v - r) = 0, with P the
    # projection across a line, weighted by the squared length of the move.
    across = square.sum() * np.eye(r.shape[1]) - moved.T @ moved
    wanted = (square[:, None] * r - moved * (moved * r).sum(axis=1, keepdims=True)).sum(axis=0)
    v = np.linalg.lstsq(across, wanted, rcond=1e-9)[0]
    shares = np.zeros(len(r))
    for _ in range(_ROUNDS):
        towards = v - r
        shares = (moved * towards).sum(axis=1) / np.maximum(np.square(towards).sum(axis=1), 1e-300)
        total = float(np.square(shares).sum())
        if total == 0.0:
            break
        v = (shares[:, None] * (t - (1 - shares)[:, None] * r)).sum(axis=0) / total
    return shares, v
