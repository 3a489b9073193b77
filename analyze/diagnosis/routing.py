"""Mixture of experts: factors per token that follow from the router's logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import softmax

from .hypothesis import Prediction
from .runs import FloatArray
from .scene import REFERENCE, Scene

_ROUTERS = ("gate", "router")
_BLOCKS = ("mlp", "block_sparse_moe", "experts", "moe", "feed_forward")


def routing(scene: Scene) -> Iterator[Prediction]:
    """The sum of the chosen probabilities, left in or divided out of the experts' output."""
    module = scene.site.module
    chosen = scene.runs.config.number("num_experts_per_tok", "num_experts_per_token", "top_k")
    if module.rpartition(".")[2] not in _BLOCKS or not chosen or scene.site.port != "output":
        return
    logits = _logits(scene)
    if logits is None or logits.shape[1] <= chosen:
        return
    top = int(chosen)
    total = np.sort(softmax(logits, axis=1), axis=1)[:, -top:].sum(axis=1, keepdims=True)
    yield Prediction(
        "routing_unnormalised",
        scene.reference * total,
        f"the affinities of the {top} chosen experts are not divided by their sum",
        "normalise the chosen affinities, as norm_topk_prob of the config says",
        parameters={"top_k": top, "mean_sum": float(total.mean())},
    )
    yield Prediction(
        "routing_renormalised",
        scene.reference / total,
        f"the affinities of the {top} chosen experts are divided by their sum, which the model does not do",
        "do not normalise the chosen affinities (norm_topk_prob of the config)",
        parameters={"top_k": top, "mean_sum": float(total.mean())},
    )


def _logits(scene: Scene) -> FloatArray | None:
    """The router's logits on the scene's tokens."""
    prefix = scene.site.module.removesuffix(".experts")
    for name in _ROUTERS:
        for site in (f"{prefix}.{name}", f"{prefix}.{name}[0]"):
            info = scene.runs.sites.get(site)
            values = None if info is None else scene.view(REFERENCE).rows(info.site)
            if values is not None:
                return values
    return None


FAMILIES = (routing,)
