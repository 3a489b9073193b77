"""From scored predictions to one cause, or none: the likeliest must explain the error and beat its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .hypothesis import DESCRIPTION, INHERITED, PATTERN, Prediction, Scored

#: Share of the error beyond the noise that a cause must explain.
ENOUGH = 0.9
#: What may remain, in units of the noise to expect.
_LARGEST_RESIDUAL = 2.0
#: Residuals (squared) closer than this are equally good.
_AS_GOOD = 2.25
UNKNOWN = "unknown"
#: Where an error is as large as noise: share of the squared error that a cause must explain (R = 1.2 leaves 0.31 beyond
#: the noise), share of what is beyond the noise, residual in units of the noise, lead over what comes with the inputs,
#: tokens it must be seen at, and numbers that may be fitted.
_PART, _PART_BEYOND, _PART_RESIDUAL, _AHEAD, _TOKENS, _MOST_FITTED = 0.25, 0.8, 1.25, 0.15, 8, 2


@dataclass(frozen=True)
class Decision:
    """What is believed about a suspect.

    Attributes:
        cause: name of a hypothesis, `inherited` or `unknown`.
        best: the best prediction, None when there was none.
        runner_up: the best one with another cause.
        confidence: from 0 to 1: the share explained, times how far the runner-up is behind.
        reason: why nothing is named, or empty.
    """

    cause: str
    best: Scored | None
    runner_up: Scored | None
    confidence: float
    reason: str


def stated(cause: str, summary: str, remedy: str, parameters: dict[str, Any], *, confidence: float = 1.0) -> Decision:
    """A decision on evidence that predicts no values of the site.

    Args:
        cause, summary, remedy, parameters: see `hypothesis.Prediction`.
        confidence: see `Decision`.
    """
    prediction = Prediction(cause, np.zeros((0, 0)), summary, remedy, parameters=parameters)
    return Decision(cause, Scored(prediction, 0.0, 0.0, 0.0, 0.0), None, confidence, "")


def decide(error: float, scored: Sequence[Scored]) -> Decision:
    """Choose among predictions.

    Args:
        error: ||t - r||.
        scored: all predictions that could be held against the target.
    """
    ordered = sorted(scored, key=lambda item: item.residual)
    if not ordered:
        return Decision(UNKNOWN, None, None, 0.0, "no hypothesis applies to this site with what was recorded")
    enough = [item for item in ordered if _suffices(item)]
    if not enough:
        best = ordered[0]
        reason = (
            f"the best guess, {best.prediction.cause}, explains {max(best.share, 0.0):.0%} of the error"
            f" and leaves {best.residual_ratio:.3g} times the noise"
        )
        return Decision(UNKNOWN, best, _rival(best, ordered), 0.0, reason)
    floor = max(enough[0].residual, 1e-300)
    # A description has so many numbers that it may undercut the noise; what explains all but the noise and is as good
    # as any law or number is no worse for that.
    specific = min((item.residual for item in enough if item.prediction.level < DESCRIPTION), default=floor)
    close = [
        item
        for item in enough
        if item.residual <= _AS_GOOD * floor or (item.residual_ratio <= 1.0 and item.residual <= _AS_GOOD * specific)
    ]
    level = min(item.prediction.level for item in close)
    best = next(item for item in close if item.prediction.level == level)
    inherited = next((item for item in close if item.prediction.cause == INHERITED), None)
    if inherited is not None:
        best = inherited
    tied = [item for item in close if _differs(item, best) and item.prediction.level == level]
    if tied and inherited is None and tied[0].residual <= _AS_GOOD * best.residual:
        reason = f"{best.prediction.cause} and {tied[0].prediction.cause} explain it equally well"
        return Decision(UNKNOWN, best, tied[0], 0.0, reason)
    rivals = [item for item in ordered if _differs(item, best) and item.prediction.level <= best.prediction.level]
    rival = rivals[0] if rivals else None
    behind = (
        (best.residual / min(rival.residual, error**2)) ** 0.5
        if rival and rival.residual > 0
        else (best.residual**0.5 / error)
    )
    return Decision(best.prediction.cause, best, rival, max(0.0, min(1.0, best.share) * (1.0 - behind)), "")


def decide_in_noise(scored: Sequence[Scored]) -> Decision:
    """Choose among predictions where the error is no larger than noise may be.

    Noise has no direction of its own. A law with one thing changed, or one number, predicts thousands of differences;
    that it explains a good part of the squared error, where a baseline's error of the same size has nothing in common
    with it, is evidence that R cannot give. Descriptions (a number for every feature or token) fit noise too well to
    count, and what is explained as well by the site's own inputs is inherited.

    Args:
        scored: all predictions that could be held against the target.
    """
    ordered = sorted(scored, key=lambda item: item.residual)
    inherited = max((item.explained for item in ordered if item.prediction.cause == INHERITED), default=0.0)
    specific = [item for item in ordered if item.prediction.cause != INHERITED and _counts_in_noise(item)]
    able = [item for item in specific if _explains_noise(item) and item.explained >= inherited + _AHEAD]
    if not able:
        best = ordered[0] if ordered else None
        return Decision(UNKNOWN, best, None, 0.0, "it is no larger than noise, and no cause explains it")
    level = min(item.prediction.level for item in able)
    best = next(item for item in able if item.prediction.level == level)
    rivals = [item for item in specific if _differs(item, best) and item.prediction.level <= level]
    rival = rivals[0] if rivals else None
    behind = max(inherited, 0.0 if rival is None else rival.explained) / best.explained
    if rival is not None and rival.explained > (1.0 - _AHEAD) * best.explained:
        reason = f"{best.prediction.cause} and {rival.prediction.cause} explain it equally well"
        return Decision(UNKNOWN, best, rival, 0.0, reason)
    return Decision(best.prediction.cause, best, rival, best.explained * (1.0 - behind), "")


def _counts_in_noise(item: Scored) -> bool:
    prediction = item.prediction
    tokens = len(prediction.values)
    return prediction.level < PATTERN and prediction.fitted <= _MOST_FITTED and tokens >= _TOKENS


def _explains_noise(item: Scored) -> bool:
    return item.explained >= _PART and item.share >= _PART_BEYOND and item.residual_ratio <= _PART_RESIDUAL


def _suffices(item: Scored) -> bool:
    return item.share >= ENOUGH and item.residual_ratio <= _LARGEST_RESIDUAL


def _differs(item: Scored, best: Scored) -> bool:
    return item.prediction.cause != best.prediction.cause


def _rival(best: Scored, ordered: Sequence[Scored]) -> Scored | None:
    return next((item for item in ordered if _differs(item, best)), None)
