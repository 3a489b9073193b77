"""What speaks for and against one measurement: R over the tokens that count, and how unlikely it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..intervals import EPSILON, interval_over_prompts
from ..measure import TokenErrors
from ..triples import FloatArray
from .exchange import exchange_p_value
from .replicates import AtSite
from .routing import BoolArray

#: With fewer tokens left, all of them count.
MIN_LEFT = 4
#: With fewer tokens, all of them can lie on the same side of the truth more often than 5 times in 100: resampling them
#: does not tell how far off they are.
FEW_TOKENS = 5
#: R of so few tokens may be too large by this factor.
FEW_MARGIN = 2.0


@dataclass(frozen=True)
class Tokens:
    """The tokens of one prompt at one site.

    Attributes:
        prompt: the prompt.
        errors: their sums of squares.
        baseline, target: downstream of a flip of the baseline, of the target, or flipped here where that shows.
        upstream: downstream of a flip of either.
        replicates: the same for every replicate.
    """

    prompt: int
    errors: TokenErrors
    baseline: BoolArray
    target: BoolArray
    upstream: BoolArray
    replicates: tuple[BoolArray, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the tokens of a measurement tell.

    Attributes:
        r: R over the tokens that count.
        r_low: lower end of its 95 % interval, where R is beyond its limit, with a margin when there are few tokens;
            else NaN.
        n_rerouted: tokens that do not.
        p_value: chance that a site whose R is at the limit shows this one, see `exchange.exchange_p_value`.
        spread: standard error of log R, from the spread over tokens (delta method).
        replicates: log R of every replicate over the tokens that neither it nor the baseline reroutes.
    """

    r: float
    r_low: float
    n_rerouted: int
    p_value: float
    spread: float
    replicates: tuple[float, ...]


_NONE = float("nan")
NOTHING = Evidence(_NONE, _NONE, 0, _NONE, _NONE, ())


def evidence(parts: Sequence[Tokens], limit: float, replicates: AtSite | None) -> Evidence:
    """Weigh one measurement.

    The p-value is that of R being at most `limit`: baseline errors `limit` times as large would be exchangeable with
    the target's. (That R is exactly 1 is false for every clean port, and with enough tokens it shows.)

    Args:
        parts: its tokens, per prompt.
        limit: largest R of a clean site.
        replicates: errors of the replicates at its site, None without any.
    """
    sums = [part.errors.sums() for part in parts]
    away = [part.baseline | part.target for part in parts]
    n_rerouted = sum(int(mask.sum()) for mask in away)
    kept = [rows[~mask] for rows, mask in zip(sums, away, strict=True)]
    if n_rerouted and sum(map(len, kept)) < MIN_LEFT:
        kept, n_rerouted = sums, 0
    tokens = np.concatenate(kept)
    reference, baseline, target = tokens.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = float(np.sqrt(target) / (np.sqrt(baseline) + EPSILON * np.sqrt(reference)))
        shares = tokens[:, 2] / target - tokens[:, 1] / baseline
    spread = 0.5 * float(np.sqrt((shares * shares).sum()))
    of_replicates = [] if replicates is None else [_log_r(parts, replicates, n) for n in range(len(replicates.errors))]
    p_value = exchange_p_value([rows * np.array([1.0, limit**2, 1.0]) for rows in kept])
    r_low = _surely(r, kept) if r > limit else _NONE
    return Evidence(r, r_low, n_rerouted, p_value, spread, tuple(of_replicates))


def _surely(r: float, kept: Sequence[FloatArray]) -> float:
    """What R is at least."""
    n_tokens = sum(map(len, kept))
    low = r if n_tokens == 1 else interval_over_prompts(kept)[0]
    return low / FEW_MARGIN if n_tokens < FEW_TOKENS else low


def _log_r(parts: Sequence[Tokens], replicates: AtSite, number: int) -> float:
    """log R of one replicate; NaN when it is unknown, 0 when its errors are the baseline's own."""
    rows: list[FloatArray] = []
    for part in parts:
        squares = replicates.squares(number, part.prompt, part.errors.positions)
        both = np.stack([part.errors.baseline_sq, squares], axis=1)
        rows.append(both[~(part.baseline | part.replicates[number]) & np.isfinite(both).all(axis=1)])
    both = np.concatenate(rows)
    baseline, own = both.sum(axis=0)
    if len(both) < min(MIN_LEFT, sum(len(part.baseline) for part in parts)) or not (baseline > 0 and own > 0):
        return _NONE
    return 0.0 if np.array_equal(both[:, 0], both[:, 1]) else 0.5 * float(np.log(own / baseline))
