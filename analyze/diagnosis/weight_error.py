"""Narrow weights where no matrix can be had: how errors of different tokens resemble each other.

A weight that was rounded differs by D, whose elements are as good as independent with mean zero. Tokens x_i, x_j then
have errors D x_i, D x_j, and

    E[<D x_i, D x_j>] = E[D^2] n_out <x_i, x_j>,

so the cosine of two tokens' errors is that of their inputs, up to 1 / sqrt(n_out). It holds with fewer tokens than
input features. What else goes wrong does not do that: errors of rounded activations are independent between tokens;
another weight, a factor, rows in another order or scaled rows make errors that resemble each other as outputs do; a
difference of low rank makes them resemble each other in a few directions.
"""

from __future__ import annotations

import numpy as np

from .ranking import Decision, stated
from .runs import FloatArray
from .scene import Scene

#: Different tokens, outputs and spread of the inputs' cosines that are needed; tokens that are used.
_TOKENS, _MOST_TOKENS, _OUTPUTS, _SPREAD = 16, 512, 64, 0.08
#: How far the error must exceed the baseline's, and which relative sizes narrow formats have.
_BEYOND, _SMALLEST, _LARGEST = 2.5, 1e-3, 0.25
#: Correlation of errors' cosines with those of inputs, its lead over that with those of outputs, and the slope.
_CORRELATION, _AHEAD, _SLOPE = 0.88, 0.05, (0.8, 1.25)
#: An output's relative error over the median one, at the 99th percentile: more means that some rows alone are wrong.
_UNEVEN = 6.0


def rounded_weight(scene: Scene) -> Decision | None:
    """Weights of a projection that were rounded, told by its errors alone; None where they do not look like that.

    Thresholds were set on projections of five architectures through FP8, INT8, INT4 and MXFP4 (correlation 0.92 to
    0.98, 0.12 to 0.25 ahead of the outputs') against permuted, scaled, low-rank and foreign weights (at most 0.82).
    """
    x = _inputs(scene)
    baseline = scene.rows.baseline
    if x is None or baseline is None or scene.features < _OUTPUTS:
        return None
    _, first = np.unique(x, axis=0, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(len(first), _MOST_TOKENS)).astype(np.int64)]
    y = scene.reference[chosen]
    bias = scene.runs.parameters.get((scene.site.module, "bias"))
    outputs = y if bias is None else y - bias.reshape(-1)
    error, noise = scene.target[chosen] - y, baseline[chosen] - y
    size, usual = float(np.linalg.norm(error)), float(np.linalg.norm(noise))
    relative = size / max(float(np.linalg.norm(outputs)), 1e-300)
    if len(chosen) < _TOKENS or size < _BEYOND * usual or not _SMALLEST <= relative <= _LARGEST:
        return None
    own = np.square(error).sum(axis=1) - np.square(noise).sum(axis=1)
    ours, theirs, errors = _cosines(x[chosen]), _cosines(outputs), _cosines(error, np.maximum(own, own.max() * 1e-3))
    if ours.std() < _SPREAD:
        return None
    by_inputs, by_outputs = (float(np.corrcoef(errors, cosines)[0, 1]) for cosines in (ours, theirs))
    slope = float((errors * ours).sum() / np.square(ours).sum())
    by_feature = np.linalg.norm(error, axis=0) / np.maximum(np.linalg.norm(outputs, axis=0), 1e-300)
    even = float(np.percentile(by_feature, 99) / max(np.median(by_feature), 1e-300)) <= _UNEVEN
    if not (
        by_inputs >= _CORRELATION and by_inputs - by_outputs >= _AHEAD and _SLOPE[0] <= slope <= _SLOPE[1] and even
    ):
        return None
    return stated(
        "quantised_weights",
        f"errors of tokens resemble each other exactly as their inputs do: every weight is off by a little, at random, "
        f"which makes {relative:.2%} of the output",
        "compare this weight with the checkpoint: it went through 8 or 4 bits, or was rounded in another way",
        {"by_inputs": by_inputs, "by_outputs": by_outputs, "slope": slope, "relative_error": relative},
        confidence=(by_inputs - max(by_outputs, 0.0)) / (1.0 - max(by_outputs, 0.0)),
    )


def _inputs(scene: Scene) -> FloatArray | None:
    """What the reference's projection is given, if the target's is given the same but for rounding."""
    if scene.site.port != "output":
        return None
    inputs = scene.inputs
    if inputs is None:
        return None
    x, given = inputs
    apart = float(np.linalg.norm(given - x)) / max(float(np.linalg.norm(x)), 1e-300)
    return x if apart <= _BEYOND * scene.noise else None


def _cosines(rows: FloatArray, squares: FloatArray | None = None) -> FloatArray:
    """Cosines of all pairs of rows, `[pairs]`; `squares` are their squared lengths where they are known better."""
    lengths = np.sqrt(np.square(rows).sum(axis=1) if squares is None else squares)
    products = rows @ rows.T / np.maximum(np.outer(lengths, lengths), 1e-300)
    return np.asarray(products[np.triu_indices(len(rows), 1)])
