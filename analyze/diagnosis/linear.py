"""Linear maps: what a projection computes from its input, recomputed with another weight or another input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import ml_dtypes
import numpy as np

from .attention import attention_sources
from .gated import gated_sources
from .hypothesis import DESCRIPTION, INHERITED, Prediction
from .inputs import Source, agrees, best_view, earlier, find_source, sources
from .runs import FloatArray
from .scene import REFERENCE, Scene

#: Tokens per input feature from which on a weight may be estimated from the reference's inputs and outputs.
_TOKENS_PER_FEATURE = 1.4
#: Rows held back from an estimate, to check it.
_HELD_BACK = 8
_PARTS = (2, 4, 8, 16, 32, 64)
#: Largest finite value of 8-bit floats and integers; Trainium's E4M3 ends at 240.
_QUANTISED = {
    "FP8 E4M3": (ml_dtypes.float8_e4m3fn, 448.0),
    "FP8 E4M3 up to 240": (ml_dtypes.float8_e4m3, 240.0),
    "FP8 E5M2": (ml_dtypes.float8_e5m2, 57344.0),
    "INT8": (np.int8, 127.0),
    "INT4": (np.int8, 7.0),
}
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b, with `weight` `[out, in]`; `stored` tells a recorded weight from an estimated one."""

    weight: FloatArray
    bias: FloatArray | None
    stored: bool

    def __call__(self, x: FloatArray) -> FloatArray:
        """Apply to rows, `[tokens, in]`."""
        product = x @ self.weight.T
        return np.asarray(product if self.bias is None else product + self.bias)


def linear(scene: Scene) -> Iterator[Prediction]:
    """Every way in which a projection goes wrong."""
    found = find_linear(scene)
    if found is None:
        return
    law, source = found
    view = best_view(scene, [source])
    x = source.rows(view)
    if x is None:
        return
    yield Prediction(INHERITED, law(x), "the projection is right; its input is not", "")
    yield from _parts(scene, law, x)
    yield from _weights(scene, law, x)
    yield from _quantised(scene, law, x)
    for variant in source.variants(view):
        if variant.rows.shape == x.shape:
            yield Prediction(
                variant.cause, law(variant.rows), variant.summary, variant.remedy, parameters=variant.parameters
            )


def find_linear(scene: Scene) -> tuple[Linear, Source] | None:
    """The linear map that the reference computes here, and from what; None when nothing reproduces it."""
    if scene.site.port != "output":
        return None
    weight = scene.runs.parameters.get((scene.site.module, "weight"))
    bias = scene.runs.parameters.get((scene.site.module, "bias"))
    inputs: list[Source] = [*attention_sources(scene), *gated_sources(scene)]
    if weight is not None and weight.ndim == 2:
        for oriented in (weight, weight.T):  # Conv1D of GPT-2 keeps [in, out]
            if oriented.shape[0] == scene.features:
                law = Linear(oriented, bias, stored=True)
                candidates = [*inputs, *sources(scene, oriented.shape[1], sums=False)]
                source = find_source(scene, candidates, partial(_apply, law))
                if source is not None:
                    return law, source
        return None
    return _estimate(scene, bias, inputs)


def _apply(law: Linear, x: FloatArray) -> FloatArray | None:
    return law(x) if x.shape[1] == law.weight.shape[1] else None


def _estimate(scene: Scene, bias: FloatArray | None, inputs: list[Source]) -> tuple[Linear, Source] | None:
    """A weight fitted to the reference's input and output, believed if it predicts rows that it was not fitted to."""
    name = scene.site.module.rpartition(".")[2].lower()
    if any(word in name for word in ("norm", "embed", "rotary", "act")):
        return None
    view, n = scene.view(REFERENCE), len(scene.reference)
    widths = {info.features for info in earlier(scene)[:6] if info.features}
    plain = [source for width in widths for source in list(sources(scene, width, sums=False))[:3]]
    wanted = scene.reference if bias is None else scene.reference - bias
    for source in (*inputs, *plain):
        x = source.rows(view)
        if x is None or n < _TOKENS_PER_FEATURE * x.shape[1] + _HELD_BACK:
            continue
        _, first = np.unique(x, axis=0, return_index=True)  # early layers see few different tokens
        if len(first) < _TOKENS_PER_FEATURE * x.shape[1] + _HELD_BACK:
            continue
        held = np.zeros(n, bool)
        held[first[:: max(len(first) // _HELD_BACK, 1)]] = True
        fitted = np.zeros(n, bool)
        fitted[first] = True
        fitted &= ~held
        solution, _, _, _ = np.linalg.lstsq(x[fitted], wanted[fitted], rcond=1e-10)
        law = Linear(np.asarray(solution.T), bias, stored=False)
        if agrees(scene, law(x[held]), held):
            return law, source
    return None


def _parts(scene: Scene, law: Linear, x: FloatArray) -> Iterator[Prediction]:
    """Partial sums: the ranks' products were not added up, or one was added too often."""
    width = x.shape[1]
    for parts in _PARTS:
        if width % parts or width // parts < 2:
            continue
        size = width // parts
        for rank in range(parts):
            span = slice(rank * size, (rank + 1) * size)
            product = replace(law, weight=law.weight[:, span])(x[:, span])
            yield Prediction(
                "missing_all_reduce",
                product,
                f"the output is the product of part {rank} of {parts} of the input alone: partial sums are not added",
                "reduce the output over the tensor-parallel ranks (a row-parallel layer, reduce_output=True)",
                parameters={"part": rank, "parts": parts},
            )


def _weights(scene: Scene, law: Linear, x: FloatArray) -> Iterator[Prediction]:
    """Transposed, or another module's weight."""
    out, wide = law.weight.shape
    if out == wide:
        yield Prediction(
            "transposed_weight",
            replace(law, weight=law.weight.T)(x),
            "the weight is transposed",
            "transpose this weight while converting the checkpoint",
        )
    if not law.stored:
        return
    parent, _, leaf = scene.site.module.rpartition(".")
    for (module, name), weight in scene.runs.parameters.items():
        if name != "weight" or module == scene.site.module or weight.shape != law.weight.shape:
            continue
        sibling = module.rpartition(".")[0] == parent
        yield Prediction(
            "exchanged_projections" if sibling else "another_weight",
            replace(law, weight=weight)(x),
            f"{scene.site.module} computes with the weight of {module}",
            f"{leaf} and {module.rpartition('.')[2]} are exchanged in the checkpoint conversion"
            if sibling
            else "check names and layer numbers in the checkpoint conversion",
            parameters={"weight_of": module},
        )


def _quantised(scene: Scene, law: Linear, x: FloatArray) -> Iterator[Prediction]:
    """Weights that went through 8 or 4 bits, and any other linear error."""
    if law.stored:
        parent, _, leaf = scene.site.module.rpartition(".")
        fused = next((names for names in _FUSED if leaf in names), ())
        together = [scene.runs.parameters.get((f"{parent}.{name}", "weight")) for name in fused]
        largest = max((float(np.abs(w).max()) for w in together if w is not None), default=0.0)
        amax = {
            "one scale per tensor": np.abs(law.weight).max(),
            "one scale per output channel": np.abs(law.weight).max(axis=1, keepdims=True),
        }
        if largest > 0:
            amax[f"one scale for {', '.join(fused)}"] = np.float64(largest)
        for name, (dtype, top) in _QUANTISED.items():
            for scheme, peak in amax.items():
                yield Prediction(
                    "quantised_weights",
                    replace(law, weight=_through(law.weight, dtype, top, np.maximum(peak, 1e-300) / top))(x),
                    f"the weights went through {name} with {scheme}",
                    "keep this module in 16 bits, or quantise it with finer scales (per channel, per block)",
                    parameters={"dtype": name, "scales": scheme},
                )
    if len(np.unique(x, axis=0)) >= 2 * x.shape[1]:
        solution, _, _, _ = np.linalg.lstsq(x, scene.target - scene.reference, rcond=1e-8)
        size = float(np.linalg.norm(solution) / max(np.linalg.norm(law.weight), 1e-300))
        yield Prediction(
            "different_weight",
            scene.reference + x @ solution,
            f"the error is a linear function of the input: the weight differs by {size:.2%}",
            "compare this weight with the checkpoint: quantised, rounded twice, or from another one",
            DESCRIPTION,
            solution.size,
            {"relative_difference": size},
        )


def _through(weight: FloatArray, dtype: object, top: float, scale: FloatArray | np.float64) -> FloatArray:
    scaled = np.clip(weight / scale, -top, top)
    if dtype is np.int8:
        return np.asarray(np.rint(scaled) * scale)
    return np.asarray(scaled.astype(dtype).astype(np.float64) * scale)  # type: ignore[call-overload]


FAMILIES = (linear,)
