"""Mixture of experts: the router's choice, what it does to the experts' sum, and experts in the wrong place.

Softmax of the chosen logits: Jiang et al. 2024, arXiv:2401.04088 (it is the softmax of all, divided by the sum of the
chosen); sigmoid: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, softmax

from .experts import Experts, order_of, recorded_experts
from .hypothesis import INHERITED, Prediction
from .inputs import agrees, best_view, sources
from .runs import FloatArray
from .scene import REFERENCE, TARGET, UNIT_ROUNDOFF, Scene

_ROUTERS = ("gate", "router")
_BLOCKS = ("mlp", "block_sparse_moe", "experts", "moe", "feed_forward")
#: How logits become affinities of the chosen experts.
_CHOSEN, _ALL, _UNIFORM = "softmax of the chosen", "softmax of all", "same for every chosen expert"
_SIGMOID, _SIGMOID_OF_CHOSEN = "sigmoid", "sigmoid, divided by the sum of the chosen"
_RULES = (_CHOSEN, _ALL, _SIGMOID, _SIGMOID_OF_CHOSEN)
#: What one rule in place of another is called, if not `routing_rule`.
_CALLED = {(_CHOSEN, _ALL): "routing_unnormalised", (_ALL, _CHOSEN): "routing_renormalised"}
#: Logits nearer than this many roundings are a tie: which expert is chosen is then a matter of rounding.
_TIE = 8.0
#: Share of the tokens whose experts must be known.
_KNOWN = 0.75
#: Names that experts' gate and up projections go by.
_GATED = ((".w1", ".w3"), (".gate_proj", ".up_proj"))


@dataclass(frozen=True)
class Routing:
    """How logits `[tokens, experts]` become affinities: `top` experts are chosen, and weighed by a rule."""

    top: int
    rule: str

    def __call__(self, logits: FloatArray, roundoff: float = 0.0) -> FloatArray:
        """Affinities, zero for experts that are not chosen; tokens whose choice is a tie are NaN."""
        ordered = np.sort(logits, axis=1)
        chosen = logits >= ordered[:, -self.top][:, None]
        if self.rule == _CHOSEN:
            affinities = softmax(np.where(chosen, logits, -np.inf), axis=1)
        elif self.rule == _UNIFORM:
            affinities = chosen / chosen.sum(axis=1, keepdims=True)
        else:
            affinities = np.where(chosen, softmax(logits, axis=1) if self.rule == _ALL else expit(logits), 0.0)
        if self.rule == _SIGMOID_OF_CHOSEN:
            affinities = affinities / affinities.sum(axis=1, keepdims=True)
        if self.top < logits.shape[1] and roundoff > 0.0:
            gap = ordered[:, -self.top] - ordered[:, -self.top - 1]
            affinities = np.where((gap <= _TIE * roundoff * np.abs(logits).max(axis=1))[:, None], np.nan, affinities)
        return np.asarray(affinities)


def router(scene: Scene) -> Iterator[Prediction]:
    """A router's affinities: another number of experts, another rule, no bias."""
    top = _top_k(scene)
    weight = scene.runs.parameters.get((scene.site.module, "weight"))
    if scene.site.module.rpartition(".")[2] not in _ROUTERS or top is None or weight is None:
        return
    if weight.ndim != 2 or len(weight) != scene.features or top >= scene.features:
        return
    bias = scene.runs.parameters.get((scene.site.module, "bias"))
    added = 0.0 if bias is None else bias
    view = scene.view(REFERENCE)
    for source in sources(scene, weight.shape[1], sums=False):
        x = source.rows(view)
        law = None if x is None else _rule(scene, top, x @ weight.T + added)
        if law is None:
            continue
        x = source.rows(best_view(scene, [source]))
        if x is None:
            return
        logits, rounding = x @ weight.T + added, _rounding(scene)
        yield Prediction(INHERITED, law(logits, rounding), "the router is right; its input is not", "")
        if bias is not None:
            remedy = "load the router's bias: NxD's router needs bias=True"
            without = law(logits - bias, rounding)
            yield Prediction("missing_bias", without, "the router's bias is not added", remedy)
        for wrong, cause, summary, remedy_of in _mistakes(law, scene.features):
            yield Prediction(
                cause, wrong(logits, rounding), summary, remedy_of, parameters={"top_k": wrong.top, "rule": wrong.rule}
            )
        return


def _rule(scene: Scene, top: int, logits: FloatArray) -> Routing | None:
    """The rule that recomputes the reference's affinities from its logits."""
    laws = (Routing(top, rule) for rule in _RULES)
    return next((law for law in laws if agrees(scene, law(logits), scene.reference)), None)


def _rounding(scene: Scene) -> float:
    return UNIT_ROUNDOFF.get(scene.runs.target_dtype, 0.0)


def _mistakes(law: Routing, experts: int) -> Iterator[tuple[Routing, str, str, str]]:
    """Wrong routings: what is computed, its cause, summary and remedy."""
    for top in dict.fromkeys((law.top - 1, law.top + 1, 2 * law.top, experts)):
        if 0 < top <= experts and top != law.top:
            yield (
                replace(law, top=top),
                "routing_top_k",
                f"{top} expert{'s are' if top > 1 else ' is'} chosen instead of {law.top}",
                "pass num_experts_per_tok of the config",
            )
    remedy = "compute affinities as the model does: before or after the choice, softmax or sigmoid, normalised or not"
    for rule in (*_RULES, _UNIFORM):
        if rule != law.rule:
            cause = "routing_ignored" if rule == _UNIFORM else _CALLED.get((law.rule, rule), "routing_rule")
            yield replace(law, rule=rule), cause, f"affinities are the {rule}, not the {law.rule}", remedy
    yield (
        Routing(experts, _UNIFORM),
        "routing_ignored",
        f"all {experts} experts are averaged",
        "choose the experts by the router's logits, and weigh their outputs by the affinities",
    )


def routing(scene: Scene) -> Iterator[Prediction]:
    """The output of a block of experts, with another routing or with experts that are not what they should be."""
    top = _top_k(scene)
    if scene.site.module.rpartition(".")[2] not in _BLOCKS or top is None or scene.site.port != "output":
        return
    logits = _logits(scene, REFERENCE)
    if logits is None or logits.shape[1] <= top:
        return
    yield from _sums(scene, logits, top)
    yield from _biases(scene)
    parts = ("", *next((pair for pair in _GATED if _recorded(scene, pair)), ()))
    ours = recorded_experts(scene, REFERENCE, parts)
    law = None if ours is None else _mixing_rule(scene, ours, logits, top)
    if ours is None or law is None:
        return
    theirs = recorded_experts(scene, TARGET, parts)
    given = _logits(scene, TARGET)
    logits, rounding = (logits, 0.0) if given is None else (given, _rounding(scene))
    if theirs is None:
        experts, wrong = ours, None
    else:
        experts, wrong = theirs.filled(ours), _misplaced(scene, theirs, ours, parts)
    values = experts.mixed(law(logits, rounding))
    if wrong is not None:
        yield Prediction(wrong[0], values, wrong[1], wrong[2], parameters=wrong[3])
    elif theirs is None or not _wrong(theirs, ours, scene.noise):
        yield Prediction(INHERITED, values, "routing and experts are right; what they are given is not", "")
        for other, cause, summary, remedy in _mistakes(law, logits.shape[1]):
            yield Prediction(
                cause,
                experts.mixed(other(logits, rounding)),
                summary,
                remedy,
                parameters={"top_k": other.top, "rule": other.rule},
            )


def _biases(scene: Scene) -> Iterator[Prediction]:
    """The biases of the experts' last projections, weighed by the router's affinities, missing or added twice."""
    prefix = scene.site.module.removesuffix(".experts")
    found = [
        values
        for (module, name), values in scene.runs.parameters.items()
        if module in (prefix, f"{prefix}.experts") and "bias" in name and values.ndim == 2
    ]
    for biases in (values for values in found if values.shape[1] == scene.features):
        sites = (scene.runs.sites.get(f"{prefix}.{name}[0]") for name in _ROUTERS)
        view = scene.view(TARGET)
        for affinities in (view.rows(info.site) for info in sites if info is not None):
            if affinities is None or affinities.shape[1] != len(biases):
                continue
            added = affinities @ biases
            for factor, cause, what in ((-1.0, "missing_bias", "not added"), (1.0, "doubled_bias", "added twice")):
                yield Prediction(
                    cause,
                    scene.expected + factor * added,
                    f"the experts' output bias is {what}",
                    "load the biases of the experts, and add them once, before the affinities are applied",
                )


def _recorded(scene: Scene, parts: tuple[str, str]) -> bool:
    return any(info.site.module.endswith(f".experts.0{parts[0]}") for info in scene.runs.sites.values())


def _mixing_rule(scene: Scene, experts: Experts, logits: FloatArray, top: int) -> Routing | None:
    """The rule with which the reference's experts make its output."""
    for rule in _RULES:
        mixed = experts.mixed(Routing(top, rule)(logits))
        known = ~np.isnan(mixed).any(axis=1)
        if known.mean() >= _KNOWN and agrees(scene, mixed[known], scene.reference[known]):
            return Routing(top, rule)
    return None


def _wrong(theirs: Experts, ours: Experts, noise: float) -> bool:
    """Whether an expert returns something else though it was given the same."""
    return theirs.given_the_same(ours, noise) and bool((theirs.same(ours, noise).diagonal() == 0.0).any())


def _misplaced(
    scene: Scene, theirs: Experts, ours: Experts, parts: tuple[str, ...]
) -> tuple[str, str, str, dict[str, object]] | None:
    """Experts of the target that are other experts, or whose gate and up projections are exchanged."""
    order = order_of(theirs, ours, scene.noise)
    if order is not None:
        listed = ", ".join(f"{n} is {was}" for n, was in enumerate(order) if was >= 0)
        remedy = "stack the experts in the order of the checkpoint, and shard them over ranks in that order"
        return "expert_order", f"experts are in another order: {listed}", remedy, {"order": order}
    if len(parts) == 3 and all(part in side.outputs for side in (theirs, ours) for part in parts):
        _, gate, up = parts
        crossed = theirs.same(ours, scene.noise, gate, up).diagonal()
        straight = theirs.same(ours, scene.noise, gate).diagonal()
        if (crossed == 1.0).any() and not (crossed == 0.0).any() and not (straight == 1.0).any():
            remedy = f"the gate goes through the activation: check which of {gate[1:]} and {up[1:]} it is"
            return "gate_up_swapped", "gate and up projection of the experts have changed places", remedy, {}
    return None


def _sums(scene: Scene, logits: FloatArray, chosen: int) -> Iterator[Prediction]:
    """The sum of the chosen probabilities, left in or divided out of the experts' output."""
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


def _logits(scene: Scene, side: str) -> FloatArray | None:
    """The router's logits on the scene's tokens, as one side has them."""
    prefix = scene.site.module.removesuffix(".experts")
    for name in _ROUTERS:
        for site in (f"{prefix}.{name}", f"{prefix}.{name}[0]"):
            info = scene.runs.sites.get(site)
            values = None if info is None else scene.view(side).rows(info.site)
            if values is not None:
                return values
    return None


FAMILIES = (router, routing)
