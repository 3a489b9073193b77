"""A missing all-reduce where no matrix can be had: the target's output depends on one rank's inputs alone.

A row-parallel projection multiplies each rank's part of the input with that part of the weight, and the ranks' products
are added. If they are not, the target is a linear function of one part of the input, which a right output is not. A
part has fewer features than the whole, so this is decided with fewer tokens than an estimate of the weight takes: fit
the output on each part, and predict tokens that were held back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .linear import PARTS, REDUCE
from .ranking import Decision, stated
from .runs import FloatArray, IntArray
from .scene import Scene

#: Tokens per fitted number, and tokens that are held back.
_TOKENS_PER_FEATURE, _HELD_BACK = 1.1, 12
#: What may be left of the target in units of the noise (a fit with few tokens to spare amplifies it), how much more
#: must be left of the reference, and how much better fewer parts must do to be believed instead of more.
_LARGEST_RESIDUAL, _CONTRAST, _BETTER = 8.0, 8.0, 2.0


@dataclass(frozen=True)
class _Fit:
    """How well one part of the input predicts the outputs of held-back tokens: relative errors."""

    part: int
    parts: int
    target: float
    reference: float


def missing_sum(scene: Scene) -> Decision | None:
    """A projection's output that one part of its input determines; None where it does not look like that.

    Needs the recorded input of the module.
    """
    inputs = scene.inputs
    if inputs is None or scene.site.port != "output":
        return None
    _, first = np.unique(inputs[1], axis=0, return_index=True)
    fits = [
        fit
        for fit in _fits(scene, inputs, np.sort(first))
        if fit.target <= _LARGEST_RESIDUAL * scene.noise and fit.reference >= _CONTRAST * fit.target
    ]
    if not fits:
        return None
    least = min(fit.target for fit in fits)
    best = max((fit for fit in fits if fit.target <= _BETTER * least), key=lambda fit: (fit.parts, -fit.target))
    return stated(
        "missing_all_reduce",
        f"the output is a linear function of part {best.part} of {best.parts} of the input alone, up to"
        f" {best.target:.2%}; of the reference that leaves {best.reference:.0%}: partial sums are not added",
        REDUCE,
        {"part": best.part, "parts": best.parts, "left": best.target, "left_of_reference": best.reference},
        confidence=1.0 - best.target / best.reference,
    )


def _fits(scene: Scene, inputs: tuple[FloatArray, FloatArray], tokens: IntArray) -> Iterator[_Fit]:
    held = tokens[:: max(len(tokens) // _HELD_BACK, 1)]
    used = np.setdiff1d(tokens, held)
    width = inputs[0].shape[1]
    for parts in PARTS:
        size = width // parts
        if width % parts or size < 2 or len(used) < _TOKENS_PER_FEATURE * (size + 1):
            continue
        for part in range(parts):
            span = slice(part * size, (part + 1) * size)
            left = [
                _left(x[:, span], y, used, held) for x, y in zip(inputs, (scene.reference, scene.target), strict=True)
            ]
            yield _Fit(part, parts, left[1], left[0])


def _left(x: FloatArray, y: FloatArray, used: IntArray, held: IntArray) -> float:
    """Relative error of held-back rows of y, predicted from x and a constant."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solution, _, _, _ = np.linalg.lstsq(x[used], y[used], rcond=1e-10)
    return float(np.linalg.norm(x[held] @ solution - y[held]) / max(np.linalg.norm(y[held]), 1e-300))
