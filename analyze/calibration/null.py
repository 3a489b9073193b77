"""The null distribution: how log R scatters between clean runs of one model, from a handful of replicates.

A replicate computes what the baseline computes, with other rounding. At every site, the log error norms of the
baseline and of K replicates are K + 1 draws from the population of clean implementations; a clean target is one more.
With x = (0, log R of the replicates), relative to the baseline, log R of a clean target is distributed about the mean
of x with variance s^2 (1 + 1 / (K + 1)): the baseline's own luck cancels.

K is small, so s^2 is moderated as in limma: its prior is an inverse chi-square whose scale belongs to the kind of
site and whose weight (degrees of freedom) comes from all sites together, by matching the moments of log s^2 (Smyth,
"Linear models and empirical Bayes methods for assessing differential expression", 2004, section 6.2). Kinds of few
sites lend from the overall level by normal-normal shrinkage. The result is Student's t with K + prior degrees of
freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, polygamma
from scipy.stats import t as student

from ..triples import FloatArray, IntArray

#: Largest prior weight, degrees of freedom. Sites depend on each other, so how alike their variances look is known from
#: fewer of them than there are: more weight would promise tails that nobody has seen.
_MOST_WEIGHT = 10.0
#: Sites that speak with one voice, about a layer's worth: what the spread of log s^2 is known from.
_DEPENDENT_SITES = 10


@dataclass(frozen=True)
class Null:
    """Student's t for log R of a clean target, one entry per site; NaN where nothing is known.

    Attributes:
        centre: expected log R.
        scale: its scale, the uncertainty of the centre included.
        freedom: degrees of freedom.
    """

    centre: FloatArray
    scale: FloatArray
    freedom: FloatArray

    def p_values(self, log_r: FloatArray) -> FloatArray:
        """Chance that a clean target has a log R of at least this."""
        with np.errstate(invalid="ignore"):
            return np.asarray(student.sf((log_r - self.centre) / self.scale, self.freedom))

    def quantile(self, probability: float) -> FloatArray:
        """R below which a clean target stays with this probability."""
        return np.asarray(np.exp(self.centre + self.scale * student.ppf(probability, self.freedom)))

    def widened(self, least: FloatArray) -> Null:
        """The same with a scale of at least `least`, the target's own sampling error."""
        return Null(self.centre, np.fmax(self.scale, least), self.freedom)


def null_of_replicates(log_r: FloatArray, kinds: Sequence[str]) -> Null:
    """Fit the null of every site.

    Args:
        log_r: `float64[sites, replicates]`, NaN where a replicate has no R. A replicate whose error is the
            baseline's own, log R = 0 exactly, tells nothing there and does not count.
        kinds: kind of each site.
    """
    told = np.isfinite(log_r) & (log_r != 0.0)
    x = np.where(told, log_r, 0.0)
    k = told.sum(axis=1).astype(np.float64)
    centre = x.sum(axis=1) / (k + 1.0)
    squares = (np.where(told, x - centre[:, None], 0.0) ** 2).sum(axis=1) + centre**2
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = squares / k
    prior, weight = prior_variance(variance, k, kinds)
    freedom = k + weight
    moderated = (weight * prior + np.where(k > 0, squares, 0.0)) / freedom
    return Null(centre, np.sqrt(moderated * (1.0 + 1.0 / (k + 1.0))), freedom)


def prior_variance(variance: FloatArray, freedom: FloatArray, kinds: Sequence[str]) -> tuple[FloatArray, float]:
    """Prior variance of every site (NaN when no site tells anything) and its weight in degrees of freedom."""
    known = (freedom > 0) & (variance > 0)
    if not known.any():
        return np.full(len(variance), np.nan), 1.0
    half = freedom[known] / 2
    # log s^2 = log sigma^2 + log(chi^2 / k): subtract the mean of the latter, and keep its variance.
    level = np.log(variance[known]) - digamma(half) + np.log(half)
    noise = polygamma(1, half)
    names, which = np.unique(np.asarray(kinds, dtype=str), return_inverse=True)
    means, inside = _kind_means(level, which[known].astype(np.int64), len(names))
    doubt = 1.0 + np.sqrt(2.0 / max(len(level) / _DEPENDENT_SITES, 1.0))
    excess = inside * doubt - float(noise.mean())
    weight = min(2.0 * _inverse_trigamma(excess), _MOST_WEIGHT) if excess > 0 else _MOST_WEIGHT
    return np.exp(means[which] - np.log(weight / 2) + digamma(weight / 2)), weight


def _kind_means(level: FloatArray, which: IntArray, count: int) -> tuple[FloatArray, float]:
    """Mean level of every kind, shrunk to the overall mean, and the variance within kinds."""
    overall = float(level.mean())
    sizes = np.bincount(which, minlength=count)
    sums = np.bincount(which, weights=level, minlength=count)
    raw = np.where(sizes > 0, sums / np.maximum(sizes, 1), overall)
    free = int((sizes[sizes > 0] - 1).sum())
    spread = float(((level - raw[which]) ** 2).sum())
    inside = spread / free if free > 0 else float(level.var()) if len(level) > 1 else 0.0
    seen = sizes > 0
    between = (
        max(float(raw[seen].var(ddof=1)) - inside * float((1.0 / sizes[seen]).mean()), 0.0) if seen.sum() > 1 else 0.0
    )
    trust = np.where(seen, between / np.maximum(between + inside / np.maximum(sizes, 1), 1e-300), 0.0)
    return overall + trust * (raw - overall), inside


def _inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value, by Newton's steps on 1 / trigamma (Smyth 2004, appendix)."""
    x = 0.5 + 1.0 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1.0 - trigamma / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-10:
            break
    return x
