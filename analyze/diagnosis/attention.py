"""Attention: what enters the output projection, recomputed from queries, keys, values and the rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from ..sites import Site, SiteInfo
from . import attention_law as law
from .inputs import InputVariant, reordered
from .runs import FloatArray
from .scene import Scene, View

#: Prompts to which a scale is fitted, and how near to the right one (in logarithms) it counts as right.
_FITTED_PROMPTS, _SAME_SCALE = 4, 5e-3
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
#: The names under which queries, keys and values are found, the last that is recorded first.
_QUERIES = ("q_norm", "q_layernorm", "q_proj", "wq")
_KEYS = ("k_norm", "k_layernorm", "k_proj", "wk")
_VALUES = ("v_norm", "v_proj", "wv")


@dataclass(frozen=True)
class Attended:
    """Attention of one module over recorded values."""

    query: Site
    key: Site
    value: Site
    rotary: tuple[Site, Site] | None
    settings: law.Attention
    parent: str

    @property
    def name(self) -> str:
        """How it is written."""
        return f"attention of {self.parent} over {self.query.name}, {self.key.name}, {self.value.name}"

    def rows(self, view: View) -> FloatArray | None:
        """Its outputs on the scene's tokens."""
        sequences = _sequences(self, view)
        return None if sequences is None else _all(self.settings, sequences)

    def variants(self, view: View) -> Iterator[InputVariant]:
        """Attention with one mistake each."""
        sequences = _sequences(self, view)
        if sequences is None:
            return
        decode = view.scene.phase == "decode"
        for cause, changes, summary, remedy, facts in mistakes(self.settings, view.scene, decode=decode):
            yield InputVariant(cause, _all(replace(self.settings, **changes), sequences), summary, remedy, facts)
        yield from reordered(_all(self.settings, sequences), self.settings.shape.head_dim)


def fitted_scale(
    source: Attended, view: View, project: Callable[[FloatArray], FloatArray]
) -> Iterator[tuple[FloatArray, float]]:
    """The scale of the scores that explains the target best, and what it predicts: `[tokens, features]`.

    Args:
        source: attention as the reference computes it.
        view: where its inputs come from.
        project: what follows the attention, from all heads to the suspect.
    """
    sequences = _sequences(source, view)
    if sequences is None:
        return
    few = sequences[:_FITTED_PROMPTS]
    target = view.scene.target[: sum(len(sequence.query) for sequence in few)]

    def misfit(log_ratio: float) -> float:
        settings = replace(source.settings, scale=source.settings.scale * math.exp(log_ratio))
        return float(np.linalg.norm(project(_all(settings, few)) - target))

    found = minimize_scalar(misfit, bounds=(-2.5, 2.5), method="bounded", options={"xatol": 1e-3})
    scale = source.settings.scale * math.exp(float(found.x))
    if abs(float(found.x)) > _SAME_SCALE:
        yield project(_all(replace(source.settings, scale=scale), sequences)), scale


def attention_sources(scene: Scene) -> Iterator[Attended]:
    """Attention as the reference may compute it, if the suspect is an output projection of one."""
    parent, _, leaf = scene.site.module.rpartition(".")
    if leaf not in _OUTPUTS:
        return
    sites = scene.runs.sites
    found = [next((sites[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in sites), None) for names in
             (_QUERIES, _KEYS, _VALUES)]  # fmt: skip
    query, key, value = found
    if query is None or key is None or value is None:
        return
    rotary = _rotary_sites(scene, query)
    shape = _shape(scene, query, key, rotary)
    if shape is None:
        return
    config = scene.runs.config
    scales = [shape.head_dim**-0.5]
    if told := config.number("query_pre_attn_scalar"):
        scales.insert(0, told**-0.5)
    if told := config.number("attention_multiplier", "attention_scale"):
        scales.insert(0, told)
    parameters = scene.runs.parameters.items()
    sinks = next((value for (module, name), value in parameters if module == parent and "sink" in name), None)
    rotations = (law.HALF, law.PAIRS) if rotary else (law.UNROTATED,)
    once = rotary is not None and (scene.runs.sites[rotary[0].name].features or 0) * 2 == (config.rotary_dim or 0)
    for scale in scales:
        for rotation in rotations:
            for window in dict.fromkeys((config.sliding_window, None)):
                softcap = config.number("attn_logit_softcapping")
                settings = law.Attention(shape, scale, softcap, sinks, window=window, rotation=rotation, once=once)
                yield Attended(query.site, key.site, value.site, rotary, settings, parent)


def _rotary_sites(scene: Scene, query: SiteInfo) -> tuple[Site, Site] | None:
    """Cosine and sine nearest before the suspect."""
    before = [
        info
        for info in scene.runs.sites.values()
        if "rotary" in info.site.module.rpartition(".")[2] and info.exec_order < scene.info.exec_order
    ]
    cos = [info.site for info in before if info.site.slot == "0"]
    sin = [info.site for info in before if info.site.slot == "1"]
    return (cos[-1], sin[-1]) if cos and sin else None


def _shape(scene: Scene, query: SiteInfo, key: SiteInfo, rotary: tuple[Site, Site] | None) -> law.Shape | None:
    head = scene.runs.config.head_dim
    if head is None and rotary is not None:
        head = scene.runs.sites[rotary[0].name].features
    if not head or not query.features or not key.features or query.features % head or key.features % head:
        return None
    return law.Shape(query.features // head, key.features // head, head)


def _sequences(source: Attended, view: View) -> list[law.Sequence] | None:
    query = view.rows(source.query)
    key, value = view.sequences(source.key), view.sequences(source.value)
    if query is None or key is None or value is None:
        return None
    cos = sin = None
    if source.rotary is not None:
        cos, sin = view.sequences(source.rotary[0]), view.sequences(source.rotary[1])
        if cos is None or sin is None:
            return None
    lengths = {p.prompt: p.n_tokens for p in view.scene.runs.trace.manifest(view.scene.runs.reference).prompts}
    found = []
    for prompt in key:
        span = view.tokens.of_prompt(prompt)
        positions = view.tokens.positions[span]
        last = int(positions.max()) + 1
        found.append(
            law.Sequence(
                query[span],
                positions,
                key[prompt][:last],
                value[prompt][:last],
                None if cos is None else cos[prompt],
                None if sin is None else sin[prompt],
                lengths.get(prompt, last),
            )
        )
    return found


def _all(settings: law.Attention, sequences: list[law.Sequence]) -> FloatArray:
    return np.concatenate([law.attend(settings, sequence) for sequence in sequences])


Mistake = tuple[str, dict[str, Any], str, str, dict[str, Any]]


def mistakes(right: law.Attention, scene: Scene, *, decode: bool) -> Iterator[Mistake]:
    """What a port gets wrong: cause, changed settings, summary, remedy, facts."""
    yield from _scales(right, scene)
    yield from _masks(right, decode=decode)
    yield from _rotations(right)
    if right.shape.heads != right.shape.kv_heads:
        other = law.ROUNDS if right.repeat == law.NEIGHBOURS else law.NEIGHBOURS
        remedy = "repeat each KV head next to itself (repeat_interleave), and shard queries and KV heads alike"
        yield "kv_head_order", {"repeat": other}, "query heads are paired with the wrong KV heads", remedy, {}
    if decode:
        remedy = "write keys and values of a decoded token to the cache, at its position, before attending"
        for what, summary in (
            ("zero_keys", "keys of decoded tokens are zero: they were never written to the cache"),
            ("zero_values", "values of decoded tokens are zero: they were never written to the cache"),
            ("zero", "keys and values of decoded tokens are zero: they were never written to the cache"),
            ("unseen", "decoded tokens do not see each other"),
            ("own_unseen", "a decoded token does not see itself"),
            ("late_keys", "keys of decoded tokens are written one slot late"),
            ("late_values", "values of decoded tokens are written one slot late"),
            ("late", "keys and values of decoded tokens are written one slot late"),
            ("overwritten", "the first decoded token is written over the prompt's last one"),
        ):
            yield "stale_cache", {"decoded": what}, summary, remedy, {"decoded": what}
    low = scene.runs.target_dtype
    if low in ("bfloat16", "float16"):
        remedy = "compute scores and softmax in float32, and cast the weights back"
        yield "softmax_low_precision", {"low": low}, f"scores and softmax are computed in {low}", remedy, {"dtype": low}


def _scales(right: law.Attention, scene: Scene) -> Iterator[Mistake]:
    d = right.shape.head_dim
    hidden = scene.runs.config.hidden_size or d
    for scale, what in (
        (1.0, "scores are not scaled"),
        (right.scale**2, "scores are scaled twice"),
        (1.0 / d, "scores are divided by head_dim instead of its square root"),
        (d**-0.5, "scores are divided by sqrt(head_dim)"),
        (d**0.5, "scores are multiplied by sqrt(head_dim)"),
        (hidden**-0.5, "scores are divided by sqrt(hidden_size)"),
        ((hidden / right.shape.heads) ** -0.5, "scores are divided by sqrt(hidden_size / heads)"),
    ):
        if abs(scale / right.scale - 1) > 1e-3:
            facts = {"scale": scale, "expected": right.scale}
            remedy = f"scale the scores by {right.scale:.6g} once (NxDI's softmax_scale is a divisor)"
            yield "attention_scale", {"scale": scale}, f"{what}: {scale:.4g}, not {right.scale:.4g}", remedy, facts
    remedy = "apply the softcap to the scaled scores, before the mask, where the config has one"
    if right.softcap is not None:
        yield "attention_softcap", {"softcap": None}, "the softcap on the scores is missing", remedy, {}
    for cap in (30.0, 50.0):
        if right.softcap is None:
            facts = {"softcap": cap}
            yield "attention_softcap", {"softcap": cap}, f"a softcap of {cap:g} is applied", remedy, facts
    if right.sinks is not None:
        remedy = "pass the learned sinks to the softmax, and shard them over heads"
        yield "attention_sinks", {"sinks": None}, "the attention sinks are ignored", remedy, {}


def _masks(right: law.Attention, *, decode: bool) -> Iterator[Mistake]:
    remedy = "check the mask: query i sees keys 0 to i, and in decode all cached ones and itself"
    if not decode:
        for ahead, summary in (
            (1, "queries see one key too far: the causal mask is off by one"),
            (2, "queries see two keys too far"),
            (-1, "queries do not see their own key: the causal mask is off by one"),
            (None, "queries see all keys: there is no causal mask"),
        ):
            yield "causal_mask", {"ahead": ahead}, summary, remedy, {"ahead": ahead}
    for forget in (1, 2, 4):
        what = "the first key is" if forget == 1 else f"the first {forget} keys are"
        yield "mask_hides_keys", {"forget": forget}, f"{what} never seen", remedy, {"hidden_keys": forget}
    if right.window is not None:
        remedy = "apply the sliding window of the config in prefill and decode, on the layers that have one"
        for window in (None, right.window - 1, right.window + 1, right.window // 2, right.window * 2):
            size = "missing" if window is None else f"{window} keys wide, not {right.window}"
            yield "sliding_window", {"window": window}, f"the sliding window is {size}", remedy, {"window": window}
    else:
        remedy = "switch the sliding window off for this model or layer"
        for window in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            summary = f"queries see the last {window} keys only"
            yield "sliding_window", {"window": window}, summary, remedy, {"window": window}


def _rotations(right: law.Attention) -> Iterator[Mistake]:
    if right.rotation == law.UNROTATED:
        return
    names = {law.HALF: "the two halves of a head", law.PAIRS: "neighbouring dimensions"}
    other = law.PAIRS if right.rotation == law.HALF else law.HALF
    for relaid in (False,) if right.once else (False, True):
        yield (
            "rope_layout",
            {"rotation": other, "relaid": relaid},
            f"the rotation pairs {names[other]} instead of {names[right.rotation]}"
            + (", and so do the angles" if relaid else ""),
            f"pair {names[right.rotation]}, or permute the rows of q_proj and k_proj accordingly",
            {"rotation": other, "relaid": relaid},
        )
    size = right.shape.head_dim
    shares = ((size // 2, False), (size // 2, True), (size // 4, False), (size // 4, True), (3 * size // 4, False))
    for rotated, strided in shares if right.rotation == law.HALF else ():
        if rotated >= 4 and rotated % 2 == 0:
            yield (
                "rope_partial",
                {"rotated": rotated, "strided": strided},
                f"only {rotated} of {size} dimensions of a head are rotated",
                "rotate head_dim * partial_rotary_factor dimensions",
                {"rotated": rotated},
            )
    remedy = "rotate queries and keys by their own positions, once"
    yield "rope_missing", {"rotation": law.UNROTATED}, "queries and keys are not rotated", remedy, {}
    yield "rope_direction", {"rotation": law.BACKWARDS}, "queries and keys are rotated backwards", remedy, {}
    for shift in (-1, 1):
        for which in ("query_shift", "key_shift"):
            what = "queries" if which == "query_shift" else "keys"
            yield (
                "position_offset",
                {which: shift},
                f"{what} are rotated for a position off by {shift:+d}",
                remedy,
                {which: shift},
            )
