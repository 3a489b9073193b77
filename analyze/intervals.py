"""Confidence intervals of R by cluster bootstrap, from per-token sums alone.

Elements of a token share their fate, so tokens are resampled, not elements; over prompts, prompts first, then
tokens within them (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). The
resampling weights depend only on the number of tokens and a fixed seed: they are drawn once and shared by all
sites of that length, which leaves one matrix product per site.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .triples import FloatArray

RESAMPLES = 1000
LEVEL = 0.95
MAX_CLUSTERS = 512
"""Longer prompts are resampled in this many runs of consecutive tokens (weights: 4 MB per length)."""

MIN_PROMPTS = 5
"""From this many prompts on, prompts are resampled too; fewer say nothing about their spread."""

EPSILON = 1e-12
"""Of the reference norm, in the denominator of R."""

_SEED = 20250117
_NONE = (float("nan"), float("nan"))


def interval_over_tokens(tokens: FloatArray) -> tuple[float, float]:
    """95 % percentile interval of R; NaN for fewer than two tokens or where an error is not finite.

    `tokens`: `float64[tokens, 3]`, the sums of squares of reference, baseline error and target error.
    """
    if len(tokens) < 2 or not np.isfinite(tokens).all():
        return _NONE
    grouped = clusters(tokens)
    return _percentiles(_weights(len(grouped)) @ grouped)


def interval_over_prompts(prompts: Sequence[FloatArray]) -> tuple[float, float]:
    """95 % interval of R over prompts and tokens; over all tokens alike below `MIN_PROMPTS` prompts."""
    prompts = [tokens for tokens in prompts if len(tokens)]
    if len(prompts) < MIN_PROMPTS:
        return interval_over_tokens(np.concatenate([np.zeros((0, 3)), *prompts]))
    if not all(np.isfinite(tokens).all() for tokens in prompts):
        return _NONE
    resampled = np.empty((len(prompts), RESAMPLES, 3))
    for row, tokens in zip(resampled, prompts, strict=True):
        grouped = clusters(tokens)
        row[:] = _weights(len(grouped)) @ grouped
    drawn = np.random.default_rng([_SEED, len(prompts)])
    replicates = np.arange(RESAMPLES)
    totals = np.zeros((RESAMPLES, 3))
    for _ in prompts:  # a prompt drawn twice meets two different resamples of its tokens
        which = drawn.integers(len(prompts), size=RESAMPLES)
        totals += resampled[which, (replicates + drawn.integers(RESAMPLES)) % RESAMPLES]
    return _percentiles(totals)


def clusters(tokens: FloatArray) -> FloatArray:
    """The rows themselves, or the sums of `MAX_CLUSTERS` runs of consecutive rows when there are more."""
    if len(tokens) <= MAX_CLUSTERS:
        return tokens
    starts = np.linspace(0, len(tokens), MAX_CLUSTERS, endpoint=False).astype(np.intp)
    return np.asarray(np.add.reduceat(tokens, starts, axis=0))


@lru_cache(maxsize=32)
def _weights(count: int) -> FloatArray:
    """How often each of `count` clusters is drawn in each resample: `float64[RESAMPLES, count]`."""
    generator = np.random.default_rng([_SEED, count])
    return generator.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES).astype(np.float64)


def _percentiles(sums: FloatArray) -> tuple[float, float]:
    """Interval from resampled sums `float64[RESAMPLES, 3]`; a resample without any error does not count."""
    reference, baseline, target = np.sqrt(np.maximum(sums, 0.0)).T
    some = (baseline > 0) | (target > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(baseline > 0, target / (baseline + EPSILON * reference), np.inf)[some]
    if len(r) == 0:
        return _NONE
    r = np.sort(r)
    tail = (1.0 - LEVEL) / 2
    low = int(np.floor(tail * (len(r) - 1)))
    return float(r[low]), float(r[len(r) - 1 - low])
