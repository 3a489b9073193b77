"""Hypotheses, what they predict, and how well a prediction explains the target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .causes import CAUSES
from .runs import FloatArray
from .scene import Scene

#: How much a hypothesis says: a law recomputed with one thing changed; one number; a rearrangement; a number for every
#: feature or token. Of two that explain a target equally well, the more specific is believed.
LAW, NUMBER, PATTERN, DESCRIPTION = range(4)
#: Share of the tokens that a prediction may leave open.
_OPEN = 0.25
#: The site does what it should, given the target's own inputs: its error came from before.
INHERITED = "inherited"


@dataclass(frozen=True)
class Prediction:
    """What the target would hold if a hypothesis were true.

    Attributes:
        cause: the hypothesis by name; causes have an entry in the knowledge base.
        values: `[tokens, features]`. Rows of NaN are left open: they depend on what no trace holds, and count as
            fitted.
        summary: what is wrong, in a sentence without full stop.
        remedy: what to change.
        level: how specific the hypothesis is.
        fitted: numbers that were fitted to the target's values.
        parameters: estimates and facts, JSON-ready.
    """

    cause: str
    values: FloatArray
    summary: str
    remedy: str
    level: int = LAW
    fitted: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cause not in CAUSES:
            raise ValueError(f"{self.cause!r} is not one of the causes in causes.py")


class Family(Protocol):
    """A family of hypotheses: yields a prediction for each that applies to a scene."""

    def __call__(self, scene: Scene) -> Iterator[Prediction]: ...


@dataclass(frozen=True)
class Scored:
    """A prediction held against the target.

    Attributes:
        prediction: the prediction.
        residual: ||t - h||^2, raised by n / (n - k) for k fitted numbers.
        explained: 1 - ||t - h||^2 / ||t - r||^2.
        share: how much of the error beyond the noise it explains, 1 for all of it.
        residual_ratio: ||t - h|| over the noise to expect at the size of h; about 1 when nothing is left to explain.
    """

    prediction: Prediction
    residual: float
    explained: float
    share: float
    residual_ratio: float


def score(scene: Scene, prediction: Prediction) -> Scored | None:
    """Hold a prediction against the target; None when it has other shapes or is not finite."""
    values, n, fitted = prediction.values, prediction.values.size, prediction.fitted
    if values.shape != scene.target.shape:
        return None
    unsaid = np.asarray(np.isnan(values).all(axis=1))
    if unsaid.any() and unsaid.mean() <= _OPEN:
        values = np.where(unsaid[:, None], scene.target, values)
        fitted += int(unsaid.sum()) * scene.features
    if not np.isfinite(values).all():
        return None
    left = float(np.square(scene.target - values).sum())
    left *= n / (n - fitted) if fitted < n else float("inf")
    noise = (scene.noise * float(np.linalg.norm(values))) ** 2
    error = scene.error**2
    if error == 0.0:
        return None
    beyond = error - min(noise, (scene.noise * float(np.linalg.norm(scene.reference))) ** 2)
    share = (error - left) / beyond if beyond > 0 else 0.0
    return Scored(
        prediction,
        left,
        1.0 - left / error,
        min(share, 1.0),
        float(np.sqrt(left / noise)) if noise > 0 else (0.0 if left == 0.0 else float("inf")),
    )
