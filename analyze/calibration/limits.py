"""Upper limits from a few observations: not the largest that was seen, but what the next ones will stay below.

A sample's 99 % quantile lies below the true one more often than not when there are few observations. These are
one-sided tolerance limits: with 95 % confidence, 99 % of clean observations stay below. From 299 observations on, an
order statistic does it without assumptions (Wilks, "Determination of sample sizes for setting tolerance limits",
1941); below, the logarithms are taken to be normal (noncentral t; Hahn and Meeker, "Statistical Intervals", 1991,
section 4.6). Observations of one run depend on each other, so the confidence is nominal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import binom, nct, norm

from ..triples import FloatArray
from .learned import ANY_KIND, KindNull
from .null import prior_variance

COVERAGE, CONFIDENCE = 0.99, 0.95
#: Smallest number of observations whose largest is a tolerance limit: 1 - 0.99^n >= 0.95.
ORDER_STATISTIC_FROM = 299


def tolerance_limit(values: FloatArray) -> float:
    """Upper limit of log-normal observations, or of any kind when there are many; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return float("nan")
    if n >= ORDER_STATISTIC_FROM:
        rank = int(binom.ppf(CONFIDENCE, n, COVERAGE)) + 1
        return float(np.sort(values)[min(rank, n) - 1])
    logs = np.log(values)
    return float(np.exp(logs.mean() + _factor(n, n - 1.0) * logs.std(ddof=1)))


def _factor(n: int, freedom: float) -> float:
    """How many standard deviations above the mean the limit lies."""
    return float(nct.ppf(CONFIDENCE, freedom, norm.ppf(COVERAGE) * np.sqrt(n)) / np.sqrt(n))


def limits_by_kind(observations: Mapping[str, FloatArray]) -> dict[str, float]:
    """An upper limit of R for every kind of site.

    Kinds of few observations borrow their spread from the others (see `null`).

    Args:
        observations: R by kind, one or more each.
    """
    moderated = _moderated(observations)
    return {
        kind: float(np.exp(centre + _factor(n, freedom) * np.sqrt(variance)))
        for kind, (centre, variance, freedom, n) in moderated.items()
    }


def nulls_by_kind(observations: Mapping[str, FloatArray]) -> dict[str, KindNull]:
    """Student's t for log R of a further clean observation, for every kind and for all others."""
    moderated = _moderated(observations)
    nulls = {
        kind: KindNull(centre, float(np.sqrt(variance * (1.0 + 1.0 / n))), freedom, n)
        for kind, (centre, variance, freedom, n) in moderated.items()
    }
    everything = np.log(np.concatenate(list(observations.values())))
    if len(everything) > 1:
        scale = float(everything.std(ddof=1) * np.sqrt(1.0 + 1.0 / len(everything)))
        freedom = float(min(max(len(observations) - 1, 1), len(everything) - 1))
        nulls[ANY_KIND] = KindNull(float(everything.mean()), scale, freedom, len(everything))
    return nulls


def _moderated(observations: Mapping[str, FloatArray]) -> dict[str, tuple[float, float, float, int]]:
    """Per kind: mean and moderated variance of log R, degrees of freedom, observations."""
    logs = [np.log(values) for values in observations.values()]
    counts = np.array([len(values) for values in logs], np.float64)
    variance = np.array([values.var(ddof=1) if len(values) > 1 else np.nan for values in logs])
    prior, weight = prior_variance(variance, counts - 1, [""] * len(logs))
    own = np.where(counts > 1, (counts - 1) * np.nan_to_num(variance), 0.0)
    known = ~np.isnan(prior)
    freedom = counts - 1 + np.where(known, weight, 0.0)
    total = (np.where(known, weight * np.nan_to_num(prior), 0.0) + own) / np.maximum(freedom, 1e-300)
    return {
        kind: (float(values.mean()), float(total[i]), float(freedom[i]), len(values))
        for i, (kind, values) in enumerate(zip(observations, logs, strict=True))
        if freedom[i] > 0
    }
