"""How many flips of the top token chance explains.

Model of a clean port. It and the baseline round differently, so their errors are exchangeable: what the baseline does
to the distance between the first token and a rival, a clean port does too, with another sign and draw. At one position,
every logit of a clean port is off by an independent normal error with standard deviation tau, so distances are off by
s = tau sqrt(2). s is the position's own baseline error (root mean square over the vocabulary) times one factor per
phase: how much more the baseline moves the distances between the likeliest tokens than those of all tokens, pooled
over positions. Then

    P(no flip) = E[ product over rivals j of Phi(m_j / tau + u) ],  u standard normal,

with m_j the reference's lead over rival j: Gauss-Hermite quadrature over the error of the first token itself.

Positions are independent given their margins, so the number of flips is Poisson-binomial.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from ..triples import FloatArray

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
#: Positions whose odds are computed at a time.
_BATCH = 256


def distance_spread(error: FloatArray, moved_sq: FloatArray, moved_n: FloatArray) -> FloatArray:
    """Standard deviation s of a clean port's error in the distance of two likely logits.

    Args:
        error: `[positions]`, root mean square error of the baseline's centred logits.
        moved_sq: `[positions]`, sum of squares of the baseline's errors in distances between likely tokens.
        moved_n: `[positions]`, their number.
    """
    total, count = float(np.nansum(moved_sq)), float(np.nansum(moved_n * error**2))
    factor = np.sqrt(total / count) if count > 0.0 else 0.0
    return factor * error


def flip_odds(margins: FloatArray, spread: FloatArray) -> FloatArray:
    """Probability of another first token at every position.

    Args:
        margins: `[positions, rivals]`, the reference's lead over its runners-up; infinite where there is none.
        spread: `[positions]`, s. Where it is 0 nothing flips; where it is NaN the odds are.
    """
    odds = np.where(np.isnan(spread), np.nan, 0.0)
    some = np.flatnonzero(spread > 0.0)
    for start in range(0, len(some), _BATCH):
        rows = some[start : start + _BATCH]
        lead = margins[rows] / (spread[rows, None] / np.sqrt(2.0))
        stays = ndtr(lead[:, :, None] + _NODES).prod(axis=1) @ _WEIGHTS
        odds[rows] = np.clip(1.0 - stays, 0.0, 1.0)
    return odds


def count_limit(odds: FloatArray, tail: float) -> int:
    """The largest number of flips that is not surprising: P(more flips) <= tail.

    Exact for independent flips of the given odds, by adding one position after the other.
    """
    alive = odds[odds > 0.0]
    reach = int(np.ceil(alive.sum() + 12.0 * np.sqrt(alive.sum()) + 40.0))
    counts = np.zeros(min(len(alive), reach) + 1)
    counts[0] = 1.0
    for p in alive.tolist():
        counts[1:] = counts[1:] * (1.0 - p) + counts[:-1] * p
        counts[0] *= 1.0 - p
    beyond = np.cumsum(counts[::-1])[::-1] - counts
    return int(np.argmax(beyond <= tail))
