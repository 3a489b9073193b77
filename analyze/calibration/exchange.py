"""Could chance alone have given the target the larger errors? A test that needs no replicates.

If a port is clean, its rounding errors and the baseline's are two draws of the same kind: swapping the two at any
token changes nothing but chance. Under such swaps `sum(target_sq) - sum(baseline_sq)` is a sum of the tokens'
differences with random signs, and so is every R as extreme as the observed one. The magnitudes stay as they were
observed, so that a few tokens with huge errors (heavy tails) cannot be mistaken for evidence: one such token is on
the target's side every other time.

Tail probabilities come from all sign patterns for few tokens. For many, the largest differences, which make the
distribution lumpy, are enumerated, and the rest follows the saddlepoint formula of Lugannani and Rice, "Saddle point
approximation for the distribution of the sum of independent random variables" (1980), as Robinson, "Saddlepoint
approximations for permutation tests and confidence intervals" (1982), applies it to randomisation tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr, ndtr
from scipy.stats import t as student

from ..intervals import MIN_PROMPTS, clusters
from ..triples import FloatArray

#: From this many tokens on, sign patterns are fine enough to speak (2^-8); fewer are judged by their log ratios.
MIN_TOKENS = 8
_ENUMERATED = 12
_LUMPS = 5
_NEWTON_STEPS = 60


def exchange_p_value(prompts: Sequence[FloatArray]) -> float:
    """One-sided p-value of R against "each token's two errors are exchangeable".

    Tokens of a prompt share their context, so with five prompts or more the prompts have to agree as well: the larger
    p-value of both levels counts. On the level of prompts, the share of the difference, (T - B) / (T + B), goes
    through Student's t, which is conservative for symmetric heavy tails (Efron, "Student's t-test under symmetry
    conditions", 1969).

    Args:
        prompts: per prompt `float64[tokens, 3]`: sums of squares of reference, baseline error and target error.

    Returns:
        NaN for fewer than two tokens or where an error is not finite.
    """
    filled = [tokens for tokens in prompts if len(tokens)]
    if sum(map(len, filled)) < 2 or not all(np.isfinite(tokens).all() for tokens in filled):
        return float("nan")
    tokens = clusters(np.concatenate(filled))
    value = sign_flip_p_value(tokens[:, 2] - tokens[:, 1]) if len(tokens) >= MIN_TOKENS else _of_log_ratios(tokens)
    if len(filled) < MIN_PROMPTS:
        return value
    sums = np.array([prompt[:, 1:].sum(axis=0) for prompt in filled])
    both = sums.sum(axis=1)
    share = np.divide(sums[:, 1] - sums[:, 0], both, out=np.zeros(len(sums)), where=both > 0)
    return max(value, mean_p_value(share))


def mean_p_value(values: FloatArray) -> float:
    """One-sided p-value of Student's t: how likely a mean this far above 0 is."""
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if spread <= 1e-12 * abs(mean) or spread == 0.0:
        return float(0.5 ** len(values)) if mean > 0 else 1.0
    return float(student.sf(mean / spread * np.sqrt(len(values)), len(values) - 1))


def sign_flip_p_value(differences: FloatArray) -> float:
    """Chance that the differences, each with a random sign, add up to at least what they do."""
    d = differences[differences != 0.0]
    if len(d) == 0:
        return 1.0
    d = d / np.abs(d).max()
    d = d[np.argsort(-np.abs(d))]
    total = float(d.sum())
    least = float(0.5 ** len(d))
    if len(d) <= _ENUMERATED:
        reached = _signs(len(d)) @ np.abs(d) >= total - 1e-12 * np.abs(d).sum()
        return float(reached.mean())
    lumps = _signs(_LUMPS) @ np.abs(d[:_LUMPS])
    return float(np.clip(_saddlepoint(np.abs(d[_LUMPS:]), total - lumps).mean(), least, 1.0))


def _of_log_ratios(tokens: FloatArray) -> float:
    """For few tokens: is the mean log ratio of the two errors above 0?"""
    both = tokens[(tokens[:, 1] > 0) & (tokens[:, 2] > 0)]
    if len(both) < len(tokens) or len(both) < 2:
        return sign_flip_p_value(tokens[:, 2] - tokens[:, 1])
    return mean_p_value(np.log(both[:, 2] / both[:, 1]))


@lru_cache(maxsize=_ENUMERATED + 1)
def _signs(count: int) -> FloatArray:
    """All sign patterns: `float64[2^count, count]` of -1 and 1."""
    patterns = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    return 1.0 - 2.0 * patterns.astype(np.float64)


def _saddlepoint(sizes: FloatArray, levels: FloatArray) -> FloatArray:
    """P(sum of randomly signed `sizes` >= level) for every level, by Lugannani and Rice."""
    reach = sizes.sum()
    spread = np.sqrt((sizes * sizes).sum())
    result = np.where(levels > 0, 0.0, 1.0)
    inner = np.abs(levels) < reach * (1 - 1e-9)
    level = np.abs(levels[inner])
    if len(level) == 0:
        return result
    u = _saddle(sizes, level)
    x = u[:, None] * sizes
    log_cosh = np.logaddexp(x, -x) - np.log(2.0)
    w = np.sqrt(np.maximum(2.0 * (u * level - log_cosh.sum(axis=1)), 0.0))
    curvature = (sizes * sizes * (1.0 - np.tanh(x) ** 2)).sum(axis=1)
    v = u * np.sqrt(curvature)
    near = (w < 1e-3) | (v < 1e-3 * w)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        correction = np.exp(-0.5 * w * w) / np.sqrt(2 * np.pi) * (1.0 / v - 1.0 / w)
    tail = np.where(near, ndtr(-level / spread), np.exp(log_ndtr(-w)) + correction)
    tail = np.clip(tail, 0.0, 1.0)
    result[inner] = np.where(levels[inner] > 0, tail, 1.0 - tail)
    return result


def _saddle(sizes: FloatArray, level: FloatArray) -> FloatArray:
    """u with sum(size tanh(u size)) = level: Newton's steps, kept inside a bracket by bisection."""
    low = np.zeros(len(level))
    high = np.full(len(level), 50.0 / sizes.min())
    u = np.minimum(level / (sizes * sizes).sum(), high)
    for _ in range(_NEWTON_STEPS):
        tanh = np.tanh(u[:, None] * sizes)
        gap = tanh @ sizes - level
        low, high = np.where(gap < 0, u, low), np.where(gap > 0, u, high)
        if (np.abs(gap) <= 1e-10 * level + 1e-300).all():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            step = u - gap / ((1.0 - tanh * tanh) @ (sizes * sizes))
        u = np.where((step > low) & (step < high), step, 0.5 * (low + high))
    return np.asarray(u)
