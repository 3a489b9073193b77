"""Mixture of experts: the router's choice, and factors per token that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, softmax

from .hypothesis import INHERITED, Prediction
from .inputs import agrees, best_view, sources
from .runs import FloatArray
from .scene import REFERENCE, Scene

_ROUTERS = ("gate", "router")
_BLOCKS = ("mlp", "block_sparse_moe", "experts", "moe", "feed_forward")
#: How logits become affinities of the chosen experts.
_CHOSEN, _ALL = "softmax of the chosen", "softmax of all"
_NORMALISED, _SIGMOID = "softmax of all, normalised", "sigmoid"


@dataclass(frozen=True)
class Router:
    """Affinities of all experts, zero for those that are not chosen: `weight` `[experts, in]`, `bias` or None."""

    weight: FloatArray
    bias: FloatArray | None
    top: int
    rule: str

    def __call__(self, x: FloatArray) -> FloatArray:
        """Affinities of rows, `[tokens, experts]`."""
        logits = x @ self.weight.T + (0.0 if self.bias is None else self.bias)
        chosen = logits >= np.sort(logits, axis=1)[:, -self.top][:, None]
        if self.rule == _CHOSEN:
            return np.asarray(softmax(np.where(chosen, logits, -np.inf), axis=1))
        affinities = np.where(chosen, expit(logits) if self.rule == _SIGMOID else softmax(logits, axis=1), 0.0)
        total = affinities.sum(axis=1, keepdims=True)
        return np.asarray(affinities / total if self.rule == _NORMALISED else affinities)


def router(scene: Scene) -> Iterator[Prediction]:
    """A router's affinities: another number of experts, another rule, no bias."""
    chosen = _top_k(scene)
    weight = scene.runs.parameters.get((scene.site.module, "weight"))
    if scene.site.module.rpartition(".")[2] not in _ROUTERS or chosen is None or weight is None:
        return
    if weight.ndim != 2 or len(weight) != scene.features or chosen >= scene.features:
        return
    bias = scene.runs.parameters.get((scene.site.module, "bias"))
    view = scene.view(REFERENCE)
    for source in sources(scene, weight.shape[1], sums=False):
        x = source.rows(view)
        laws = [Router(weight, bias, chosen, rule) for rule in (_CHOSEN, _ALL, _NORMALISED, _SIGMOID)]
        law = next((law for law in laws if x is not None and agrees(scene, law(x), scene.reference)), None)
        if law is not None:
            x = source.rows(best_view(scene, [source]))
            yield from _mistakes(law, x) if x is not None else ()
            return


def _mistakes(law: Router, x: FloatArray) -> Iterator[Prediction]:
    yield Prediction(INHERITED, law(x), "the router is right; its input is not", "")
    if law.bias is not None:
        remedy = "load the router's bias: NxD's router needs bias=True"
        yield Prediction("missing_bias", replace(law, bias=None)(x), "the router's bias is not added", remedy)
    for top in (law.top - 1, law.top + 1, 2 * law.top, len(law.weight)):
        if 0 < top <= len(law.weight) and top != law.top:
            yield Prediction(
                "routing_top_k",
                replace(law, top=top)(x),
                f"{top} experts are chosen instead of {law.top}",
                "pass num_experts_per_tok of the config",
                parameters={"top_k": top, "expected": law.top},
            )
    for rule in (_CHOSEN, _ALL, _NORMALISED, _SIGMOID):
        if rule != law.rule:
            yield Prediction(
                "routing_rule",
                replace(law, rule=rule)(x),
                f"affinities are the {rule}, not the {law.rule}",
                "compute affinities as the model does: before or after the choice, softmax or sigmoid",
                parameters={"rule": rule, "expected": law.rule},
            )


def routing(scene: Scene) -> Iterator[Prediction]:
    """The sum of the chosen probabilities, left in or divided out of the experts' output."""
    chosen = _top_k(scene)
    if scene.site.module.rpartition(".")[2] not in _BLOCKS or chosen is None or scene.site.port != "output":
        return
    logits = _logits(scene)
    if logits is None or logits.shape[1] <= chosen:
        return
    total = np.sort(softmax(logits, axis=1), axis=1)[:, -chosen:].sum(axis=1, keepdims=True)
    facts = {"top_k": chosen, "mean_sum": float(total.mean())}
    yield Prediction(
        "routing_unnormalised",
        scene.reference * total,
        f"the affinities of the {chosen} chosen experts are not divided by their sum",
        "normalise the chosen affinities, as norm_topk_prob of the config says",
        parameters=facts,
    )
    yield Prediction(
        "routing_renormalised",
        scene.reference / total,
        f"the affinities of the {chosen} chosen experts are divided by their sum, which the model does not do",
        "do not normalise the chosen affinities (norm_topk_prob of the config)",
        parameters=facts,
    )


def _top_k(scene: Scene) -> int | None:
    told = scene.runs.config.number("num_experts_per_tok", "num_experts_per_token", "top_k")
    return int(told) if told else None


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


FAMILIES = (router, routing)
