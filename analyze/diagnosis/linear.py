"""Linear maps: what a projection computes from its input, recomputed with another weight or another input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from .attention import Attended, attention_sources, fitted_scale
from .gated import gated_sources
from .hypothesis import DESCRIPTION, INHERITED, Prediction
from .inputs import Source, agrees, best_view, earlier, find_source, sources
from .padding import seen_padding
from .quantised import NARROW, as_released, through_narrow_formats
from .runs import FloatArray
from .scene import Scene, View

#: Tokens per input feature from which on a weight may be estimated from the reference's inputs and outputs.
_TOKENS_PER_FEATURE = 1.05
#: Rows held back from an estimate, to check it.
_HELD_BACK = 8
_NOT_LINEAR = ("norm", "embed", "rotary", "act", "dropout")
#: Ranks over which a product may be split, and what to do about sums that stay partial.
PARTS = (2, 4, 8, 16, 32, 64)
REDUCE = "reduce the output over the tensor-parallel ranks (a row-parallel layer, reduce_output=True)"
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
    """Every way in which a projection, or what is recorded as its input, goes wrong."""
    law: Linear | None
    if scene.site.port == "input":
        law, source = None, find_source(scene, _composed(scene), lambda x: x)
    else:
        law, source = find_linear(scene) or (None, None)
    if source is None:
        return
    view = best_view(scene, [source])
    x = source.rows(view)
    if x is None:
        return
    right = "the projection is right; its input is not" if law else f"it is {source.name}; that is what is wrong"
    yield Prediction(INHERITED, law(x) if law else x, right, "")
    if law is not None:
        yield from _parts(scene, law, x)
        yield from _weights(scene, law, x)
        yield from _quantised(scene, law, x)
    if isinstance(source, Attended):
        yield from _scale(scene, source, view, law)
        if law is None:
            yield from seen_padding(scene, x, source.settings.shape.kv_heads, source.settings.shape.head_dim)
    for variant in source.variants(view):
        if variant.rows.shape == x.shape:
            values = law(variant.rows) if law else variant.rows
            yield Prediction(variant.cause, values, variant.summary, variant.remedy, parameters=variant.parameters)


def _scale(scene: Scene, source: Attended, view: View, law: Linear | None) -> Iterator[Prediction]:
    """Any other scale of the scores."""
    right = source.settings.scale
    for values, scale in fitted_scale(source, view, law or (lambda x: x)):
        yield Prediction(
            "attention_scale",
            values,
            f"scores are scaled by {scale:.4g}, {scale / right:.4g} times what they should be",
            f"scale the scores by {right:.6g} once",
            fitted=1,
            parameters={
                "scale": scale,
                "expected": right,
                "ratio_equals": scene.runs.config.name_factor(scale / right, 1e-2),
            },
        )


def _composed(scene: Scene) -> list[Source]:
    """What a projection may be given: attention, a gated product, an earlier output."""
    return [*attention_sources(scene), *gated_sources(scene), *sources(scene, scene.features, sums=False, own=False)]


def find_linear(scene: Scene) -> tuple[Linear, Source] | None:
    """The linear map that the reference computes here, and from what; None when nothing reproduces it."""
    module = scene.site.module
    if scene.site.port != "output" or any(word in module.rpartition(".")[2].lower() for word in _NOT_LINEAR):
        return None
    weight, bias = scene.runs.parameters.get((module, "weight")), scene.runs.parameters.get((module, "bias"))
    composed: list[Source] = [*attention_sources(scene), *gated_sources(scene)]
    if weight is not None and weight.ndim == 2:
        for oriented in (weight, weight.T):  # Conv1D of GPT-2 keeps [in, out]
            if oriented.shape[0] == scene.features:
                law = Linear(oriented, bias, stored=True)
                candidates = [*sources(scene, oriented.shape[1], sums=False), *composed]
                source = find_source(scene, candidates, partial(_apply, law))
                if source is not None:
                    return law, source
        return None
    inputs = [info for info in scene.runs.sites.values() if info.site.port == "input" and info.site.module == module]
    near = [] if inputs else earlier(scene)[:6]
    widths = {info.features for info in (*inputs, *near) if info.features}
    plain = [source for width in sorted(widths) for source in islice(sources(scene, width, sums=False), 3)]
    view, outputs = scene.everywhere
    for source in (*plain, *composed):
        x = source.rows(view)
        weight = None if x is None else estimate(scene, x, outputs if bias is None else outputs - bias)
        if weight is not None:
            return Linear(as_released(weight), bias, stored=False), source
    return None


def _apply(law: Linear, x: FloatArray) -> FloatArray | None:
    return law(x) if x.shape[1] == law.weight.shape[1] else None


def estimate(scene: Scene, x: FloatArray, y: FloatArray) -> FloatArray | None:
    """A weight from the reference's inputs and outputs, `[out, in]`, if it predicts tokens it was not fitted to.

    Equal rows count once: early layers see as few different tokens as the prompts have. None when there are too few
    rows or when y is no linear function of x.
    """
    if len(x) < _TOKENS_PER_FEATURE * x.shape[1] + _HELD_BACK:
        return None
    _, first = np.unique(x, axis=0, return_index=True)
    if len(first) < _TOKENS_PER_FEATURE * x.shape[1] + _HELD_BACK:
        return None
    held = first[:: max(len(first) // _HELD_BACK, 1)]
    fitted = np.setdiff1d(first, held)
    solution, _, _, _ = np.linalg.lstsq(x[fitted], y[fitted], rcond=1e-12)
    return np.asarray(solution.T) if agrees(scene, x[held] @ solution, y[held]) else None


def _parts(scene: Scene, law: Linear, x: FloatArray) -> Iterator[Prediction]:
    """Partial sums: the ranks' products were not added up, or one was added too often."""
    width = x.shape[1]
    for parts in PARTS:
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
                REDUCE,
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
    parent, _, leaf = scene.site.module.rpartition(".")
    for module, weight in _others(scene, law):
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


def _others(scene: Scene, law: Linear) -> Iterator[tuple[str, FloatArray]]:
    """Weights of the same shape: stored ones, or estimated ones of the same module in other layers."""
    if law.stored:
        for (module, name), weight in scene.runs.parameters.items():
            if name == "weight" and module != scene.site.module and weight.shape == law.weight.shape:
                yield module, weight
        return
    leaf = scene.site.module.rpartition(".")[2]
    view, _ = scene.everywhere
    for name, info in scene.runs.sites.items():
        module = info.site.module
        if name != module or module.rpartition(".")[2] != leaf or module == scene.site.module:
            continue
        x, y = view.given(module), view.rows(info.site)
        bias = scene.runs.parameters.get((module, "bias"))
        if y is not None and bias is not None and bias.shape == y.shape[1:]:
            y = y - bias
        if x is None or y is None or (y.shape[1], x.shape[1]) != law.weight.shape:
            continue
        estimated = estimate(scene, x, y)
        if estimated is not None:
            yield module, estimated


def _quantised(scene: Scene, law: Linear, x: FloatArray) -> Iterator[Prediction]:
    """Weights that went through 8 or 4 bits, and any other linear error."""
    parent, _, leaf = scene.site.module.rpartition(".")
    fused = next((names for names in _FUSED if leaf in names), ())
    together = [scene.runs.parameters.get((f"{parent}.{name}", "weight")) for name in fused]
    largest = max((float(np.abs(w).max()) for w in together if w is not None), default=0.0)
    shared = {", ".join(fused): largest} if largest > 0 else {}
    kept = NARROW.get(scene.runs.target_dtype)
    for name, scheme, weight in through_narrow_formats(law.weight, shared):
        # A port multiplies by the narrow values and scales the product, or keeps scaled weights in its own dtype.
        for dequantised in (weight,) if kept is None else (weight, weight.astype(kept).astype(np.float64)):
            yield Prediction(
                "quantised_weights",
                replace(law, weight=dequantised)(x),
                f"the weights went through {name} with {scheme}",
                "keep this module in 16 bits, or quantise it with finer scales (per channel, per block)",
                parameters={"dtype": name, "scales": scheme},
            )
    if len(np.unique(x, axis=0)) >= 2 * x.shape[1]:
        solution, _, _, _ = np.linalg.lstsq(x, scene.target - law(x), rcond=1e-8)
        size = float(np.linalg.norm(solution) / max(np.linalg.norm(law.weight), 1e-300))
        yield Prediction(
            "different_weight",
            law(x) + x @ solution,
            f"the error is a linear function of the input: the weight differs by {size:.2%}",
            "compare this weight with the checkpoint: quantised, rounded twice, or from another one",
            DESCRIPTION,
            solution.size,
            {"relative_difference": size},
        )


FAMILIES = (linear,)
