"""RMSNorm and LayerNorm, recomputed with one thing changed at a time.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467; LayerNorm: Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .hypothesis import INHERITED, Prediction
from .inputs import SiteSum, best_view, find_source, sources, stream_after
from .runs import FloatArray
from .scene import Scene, View

_EPSILONS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
#: Factors of a summand nearer than this to 0, 1 or 2 are taken to be it.
_PLAIN = 5e-3
_LOW_PRECISION = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Norm:
    """How a norm is computed over groups of `width` features.

    Attributes:
        weight: gain, `[width]`.
        bias: or None.
        epsilon: added to the variance or mean square.
        offset: added to the gain (1 in Gemma's norms).
        centred: subtracts the mean first, as LayerNorm does.
    """

    weight: FloatArray
    bias: FloatArray | None
    epsilon: float
    offset: float
    centred: bool

    def __call__(self, x: FloatArray) -> FloatArray:
        """Normalise rows, `[tokens, n width]`."""
        groups = x.reshape(len(x), -1, self.weight.size)
        if self.centred:
            groups = groups - groups.mean(axis=-1, keepdims=True)
        square = np.square(groups).mean(axis=-1, keepdims=True)
        normed = groups / np.sqrt(np.maximum(square + self.epsilon, 1e-300)) * (self.weight + self.offset)
        return np.asarray((normed if self.bias is None else normed + self.bias).reshape(x.shape))

    def in_low_precision(self, x: FloatArray, dtype: Any, *, wide_sum: bool) -> FloatArray:
        """The same with every intermediate rounded to a 16-bit type; the mean itself is summed in float32.

        `wide_sum` keeps the squares unrounded before they are summed.
        """
        groups: npt.NDArray[Any] = x.reshape(len(x), -1, self.weight.size).astype(dtype)
        if self.centred:
            groups = (groups - groups.astype(np.float32).mean(axis=-1, keepdims=True).astype(dtype)).astype(dtype)
        wide = groups.astype(np.float32)
        square = np.square(wide) if wide_sum else np.square(wide).astype(dtype).astype(np.float32)
        mean = square.mean(axis=-1, keepdims=True).astype(dtype)
        shifted = (mean.astype(np.float32) + np.float32(self.epsilon)).astype(dtype)
        inverse = (1.0 / np.sqrt(shifted.astype(np.float32))).astype(dtype)
        gain: npt.NDArray[Any] = (self.weight + self.offset).astype(dtype)
        normed = (groups * inverse).astype(dtype) * gain
        full = normed.astype(dtype).astype(np.float64)
        return np.asarray((full if self.bias is None else full + self.bias).reshape(x.shape))


@dataclass(frozen=True)
class Found:
    """The norm that recomputes the reference, and from what."""

    norm: Norm
    source: SiteSum


def find_norm(scene: Scene) -> Found | None:
    """Which norm the reference computes here, None when none of them reproduces it."""
    module = scene.site.module
    weight = scene.runs.parameters.get((module, "weight"))
    if weight is None or weight.ndim != 1 or scene.features % weight.size or scene.site.port != "output":
        return None
    bias = scene.runs.parameters.get((module, "bias"))
    told = scene.runs.config.norm_epsilon
    epsilons = ([told] if told is not None else []) + [1e-6, 1e-5, 1e-12, 1e-8]
    first = bias is not None
    kinds = [
        Norm(weight, bias, epsilons[0], offset, centred) for centred in (first, not first) for offset in (0.0, 1.0)
    ]
    candidates = list(sources(scene, scene.features, sums=True))
    for norm in kinds:
        source = find_source(scene, candidates, norm)
        if source is not None:
            return Found(norm, source)
    for epsilon in epsilons[1:]:
        norm = replace(kinds[0], epsilon=epsilon)
        source = find_source(scene, candidates, norm)
        if source is not None:
            return Found(norm, source)
    return None


def norms(scene: Scene) -> Iterator[Prediction]:
    """Every way in which a norm goes wrong."""
    found = find_norm(scene)
    if found is None:
        return
    norm, view = found.norm, best_view(scene, [found.source])
    x = found.source.rows(view)
    if x is None:
        return
    yield Prediction(INHERITED, norm(x), "the norm is right; its input is not", "")
    yield from _epsilon(scene, norm, x)
    yield from _gain(scene, norm, x)
    yield from _statistics(scene, norm, x)
    yield from _input(scene, found, view)


def _epsilon(scene: Scene, norm: Norm, x: FloatArray) -> Iterator[Prediction]:
    """Epsilon from the data: every token's factor s of x w obeys 1 / s^2 = mean square + epsilon."""
    groups = x.reshape(-1, norm.weight.size)
    centred = groups - groups.mean(axis=-1, keepdims=True) if norm.centred else groups
    shifted = scene.target.reshape(groups.shape) - (0.0 if norm.bias is None else norm.bias)
    plain = centred * (norm.weight + norm.offset)
    factor = (plain * shifted).sum(axis=-1) / np.maximum(np.square(plain).sum(axis=-1), 1e-300)
    usable = factor > 0
    if usable.sum() < 2:
        return
    square = np.square(centred).mean(axis=-1)
    estimates = 1.0 / np.square(factor[usable]) - square[usable]
    weights = 1.0 / np.square(square[usable])  # a relative error of s weighs as the mean square
    estimate = float((estimates * weights).sum() / weights.sum())
    if estimate <= 0.3 * min(norm.epsilon, 1e-12):
        return
    nearest = min(_EPSILONS[1:], key=lambda value: abs(np.log(value / max(estimate, 1e-300))))
    epsilon = nearest if abs(nearest / estimate - 1) < 0.05 else estimate
    if abs(epsilon / norm.epsilon - 1) < 0.05 if norm.epsilon else epsilon < 1e-12:
        return
    key = scene.runs.config.norm_epsilon_key
    yield Prediction(
        "norm_epsilon",
        replace(norm, epsilon=epsilon)(x),
        f"the norm adds an epsilon of {epsilon:.3g} instead of {norm.epsilon:.3g}",
        f"pass {key} = {norm.epsilon:.3g} of the config to the norm",
        fitted=1,
        parameters={"epsilon": epsilon, "expected": norm.epsilon, "estimate": estimate},
    )


def _gain(scene: Scene, norm: Norm, x: FloatArray) -> Iterator[Prediction]:
    offset = 1.0 if norm.offset == 0.0 else 0.0
    yield Prediction(
        "norm_offset",
        replace(norm, offset=offset)(x),
        f"the norm multiplies by {'1 + w' if offset else 'w'} instead of {'w' if offset else '1 + w'}",
        "add 1 to the stored norm weights while converting, once"
        if norm.offset
        else "do not add 1 to the norm weights",
    )
    yield Prediction(
        "norm_gain_missing",
        replace(norm, weight=np.ones_like(norm.weight), offset=0.0)(x),
        f"the weight of {scene.site.module} is not applied: it is one everywhere",
        "load this weight: its name is missing from the checkpoint conversion",
    )
    if norm.bias is not None:
        yield Prediction(
            "missing_bias",
            replace(norm, bias=None)(x),
            f"the bias of {scene.site.module} is not added",
            "load the bias: LayerNorm of this checkpoint has one",
        )
    for (module, name), weight in scene.runs.parameters.items():
        if name == "weight" and weight.shape == norm.weight.shape and module != scene.site.module:
            bias = scene.runs.parameters.get((module, "bias")) if norm.bias is not None else None
            yield Prediction(
                "another_weight",
                replace(norm, weight=weight, bias=bias)(x),
                f"the norm multiplies by the weight of {module}",
                "check names and layer numbers in the checkpoint conversion",
                parameters={"weight_of": module},
            )


def _statistics(scene: Scene, norm: Norm, x: FloatArray) -> Iterator[Prediction]:
    yield Prediction(
        "norm_kind",
        replace(norm, centred=not norm.centred)(x),
        "LayerNorm is computed where the model has RMSNorm"
        if not norm.centred
        else "RMSNorm is computed where the model has LayerNorm",
        "use the norm that the checkpoint was trained with: a bias in it means LayerNorm",
    )
    yield Prediction(
        "norm_missing",
        x,
        "the values are not normalised at all",
        "apply the norm before what follows",
    )
    low = _LOW_PRECISION.get(scene.runs.target_dtype)
    for wide_sum in (False, True) if low is not None else ():
        yield Prediction(
            "norm_low_precision",
            norm.in_low_precision(x, low, wide_sum=wide_sum),
            f"the norm's variance is computed in {scene.runs.target_dtype}",
            "compute variance and reciprocal root in float32, then cast back",
            parameters={"rounded": scene.runs.target_dtype},
        )


def _input(scene: Scene, found: Found, view: View) -> Iterator[Prediction]:
    """A residual connection lost on the way in, doubled or scaled: the norm sees another sum of the two summands."""
    if len(found.source.sites) != 2:
        return
    stream = stream_after(scene, found.source)
    for kept, lost in (found.source.sites, found.source.sites[::-1]):
        x, added = SiteSum((kept,)).rows(view), SiteSum((lost,)).rows(view)
        if x is None or added is None:
            continue
        # A norm sees no common factor, so that twice the one summand and half the other look alike. What the layer
        # makes of the sum later on tells them apart.
        factor = None if stream is None else _share(stream - x, added)
        if factor is None or abs(factor) < _PLAIN:
            yield Prediction(
                "missing_residual",
                found.norm(x),
                f"the norm sees {kept.name} alone: {lost.name} is not added",
                "add the residual before this norm, and return the sum to the next layer",
                parameters={"sees": kept.name, "lacks": lost.name},
            )
        if factor is None or abs(factor - 2) < _PLAIN:
            yield Prediction(
                "doubled_residual",
                found.norm(x + 2 * added),
                f"{lost.name} is added twice" + ("" if stream is not None else f", or half of {kept.name}"),
                "add the residual once: some norms of the port already return it",
                parameters={"twice": lost.name},
            )
        if factor is not None and min(abs(factor - plain) for plain in (0.0, 1.0, 2.0)) >= _PLAIN:
            yield Prediction(
                "residual_multiplier",
                found.norm(x + factor * added),
                f"{lost.name} is multiplied by {factor:.4g} before it is added",
                "add both summands as they are, or with residual_multiplier where the config has one",
                fitted=1,
                parameters={"factor": factor, "of": lost.name},
            )


def _share(sum_less_one: FloatArray, other: FloatArray) -> float:
    return float((sum_less_one * other).sum() / max(float(np.square(other).sum()), 1e-300))


FAMILIES = (norms,)
