"""Activation functions, recomputed from their input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy.special import erf, expit

from .hypothesis import INHERITED, Prediction
from .inputs import SiteSum, best_view, find_source, sources
from .runs import FloatArray
from .scene import Scene

Activation = Callable[[FloatArray], FloatArray]


def gelu_tanh(x: FloatArray) -> FloatArray:
    """Hendrycks and Gimpel 2016, arXiv:1606.08415, the tanh approximation."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": lambda x: np.asarray(x * expit(x)),
    "gelu": lambda x: np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2)))),
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: np.asarray(x * expit(1.702 * x)),
    "relu": lambda x: np.maximum(x, 0.0),
    "relu2": lambda x: np.square(np.maximum(x, 0.0)),
    "sigmoid": lambda x: np.asarray(expit(x)),
    "tanh": lambda x: np.asarray(np.tanh(x)),
    "identity": lambda x: x,
}
#: What configs call them.
ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
}


def expected_first(scene: Scene) -> list[str]:
    """Names of all activations, the config's first."""
    told = scene.runs.config.activation or ""
    name = ALIASES.get(told, told)
    return [name, *(other for other in ACTIVATIONS if other != name)] if name in ACTIVATIONS else list(ACTIVATIONS)


def activations(scene: Scene) -> Iterator[Prediction]:
    """Another activation than the reference's."""
    if (scene.site.module, "weight") in scene.runs.parameters or scene.site.port != "output":
        return
    found: tuple[str, SiteSum] | None = None
    candidates = list(sources(scene, scene.features, sums=False))[:6]
    for name in expected_first(scene):
        source = None if name == "identity" else find_source(scene, candidates, ACTIVATIONS[name])
        if source is not None:
            found = name, source
            break
    if found is None:
        return
    expected, source = found
    x = source.rows(best_view(scene, [source]))
    if x is None:
        return
    yield Prediction(INHERITED, ACTIVATIONS[expected](x), "the activation is right; its input is not", "")
    for name, function in ACTIVATIONS.items():
        if name != expected:
            yield Prediction(
                "wrong_activation",
                function(x),
                f"{name} is computed instead of {expected}",
                f"use {scene.runs.config.activation or expected} (hidden_act of the config)",
                parameters={"activation": name, "expected": expected},
            )


FAMILIES = (activations,)
