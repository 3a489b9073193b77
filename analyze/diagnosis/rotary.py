"""Rotary embeddings: cosine and sine recomputed from positions with one thing changed at a time.

RoPE: Su et al. 2021, arXiv:2104.09864. Linear scaling: Chen et al. 2023, arXiv:2306.15595. YaRN: Peng et al. 2023,
arXiv:2309.00071, sections 3.2 and 3.4. Llama 3: the wavelength ramp of its reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from scipy.optimize import minimize_scalar

from .hypothesis import INHERITED, Prediction
from .inputs import agrees
from .runs import FloatArray
from .scene import Scene

_BASES = (1e4, 5e5, 1e6, 1e5, 1.5e5, 1.6e5, 2.5e5, 5e6, 8e6, 1e7, 1e3)
_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 40.0, 64.0)
#: How far from a usual base another is searched, as a logarithm: half the widest gap between two, or a factor of 100
#: beyond the ends.
_REACH = 4.6
#: A fitted base is preferred to a usual one when the usual one leaves this many times as much.
_CLEARLY = 1.5
_HALF, _PAIRS, _ONCE = "half", "pairs", "once"


@dataclass(frozen=True)
class Rotary:
    """How cosine and sine are computed.

    Attributes:
        dim: rotated dimensions of a head.
        base: `rope_theta`.
        scaling: `rope_type` and its settings, as the config gives them.
        multiplier: factor on cosine and sine.
        layout: `half`: frequencies 0, 1, ... twice; `pairs`: every frequency twice in a row; `once`: not repeated.
        shift: added to every position.
        low: a dtype in which positions and frequencies are multiplied, or None.
        frequency_dim: dimensions over which the frequencies are spread, if not `dim`.
        narrow: a dtype to which cosine and sine are cast before they are multiplied, or None.
    """

    dim: int
    base: float
    scaling: dict[str, Any]
    multiplier: float
    layout: str
    shift: float = 0.0
    low: Any = None
    frequency_dim: int | None = None
    narrow: Any = None

    def frequencies(self) -> FloatArray:
        """Radians per position, `[dim / 2]`."""
        pairs = np.arange(self.dim // 2)
        plain = self.base ** (-2.0 * pairs / (self.frequency_dim or self.dim))
        kind, factor = self.scaling.get("rope_type", "default"), float(self.scaling.get("factor") or 1.0)
        if kind == "linear":
            return np.asarray(plain / factor)
        if kind == "llama3":
            return _llama3(plain, factor, self.scaling)
        if kind == "yarn":
            return _yarn(plain, factor, self.base, self.dim, self.scaling)
        return np.asarray(plain)

    def __call__(self, positions: FloatArray, sine: bool) -> FloatArray:
        """Cosine or sine at positions, `[tokens, features]`."""
        frequencies, moved = self.frequencies(), np.asarray(positions, np.float64) + self.shift
        if self.low is not None:
            rounded = moved.astype(self.low)[:, None] * frequencies.astype(self.low)
            angles = rounded.astype(np.float64)
        else:
            angles = moved[:, None] * frequencies
        if self.layout == _HALF:
            angles = np.concatenate([angles, angles], axis=1)
        elif self.layout == _PAIRS:
            angles = np.repeat(angles, 2, axis=1)
        values = np.sin(angles) if sine else np.cos(angles)
        if self.narrow is not None:
            product = values.astype(self.narrow) * np.asarray(self.multiplier).astype(self.narrow)
            return np.asarray(product.astype(np.float64))
        return np.asarray(values * self.multiplier)


def _llama3(plain: FloatArray, factor: float, scaling: dict[str, Any]) -> FloatArray:
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    length = float(scaling.get("original_max_position_embeddings") or 8192)
    turns = length * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - smooth) * plain / factor + smooth * plain)


def _yarn(plain: FloatArray, factor: float, base: float, dim: int, scaling: dict[str, Any]) -> FloatArray:
    length = float(scaling.get("original_max_position_embeddings") or 4096)

    def pair_turning(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_turning(float(scaling.get("beta_fast") or 32.0))
    high = pair_turning(float(scaling.get("beta_slow") or 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray(plain * (1 - slowed) + plain / factor * slowed)


def rotary(scene: Scene) -> Iterator[Prediction]:
    """Every way in which the rotary embedding goes wrong."""
    if "rotary" not in scene.site.module.lower() or scene.site.slot not in ("0", "1"):
        return
    sine = scene.site.slot == "1"
    law = _law(scene, sine)
    if law is None:
        return
    positions = scene.positions.astype(np.float64)
    for changed, cause, summary, remedy, parameters, fitted in _variants(scene, law, sine):
        values = changed(positions, sine)
        yield Prediction(cause, values, summary, remedy, fitted=fitted, parameters=parameters)
    yield Prediction(INHERITED, law(positions, sine), "cosine and sine are right", "")
    yield from _restarted(scene, law, sine)


def _law(scene: Scene, sine: bool) -> Rotary | None:
    """The rotary embedding that recomputes the reference."""
    config = scene.runs.config
    rope = config.rope
    base = float(rope["rope_theta"] or 1e4)
    for layout, dim in ((_HALF, scene.features), (_PAIRS, scene.features), (_ONCE, 2 * scene.features)):
        for multiplier in dict.fromkeys((config.attention_factor or 1.0, 1.0)):
            law = Rotary(dim, base, rope, multiplier, layout)
            if agrees(scene, law(scene.positions.astype(np.float64), sine), scene.reference):
                return law
    return None


_Variant = tuple[Rotary, str, str, str, dict[str, Any], int]


def _variants(scene: Scene, law: Rotary, sine: bool) -> Iterator[_Variant]:
    kind = law.scaling.get("rope_type", "default")
    yield from _bases(scene, law, sine)
    if kind != "default":
        for multiplier in dict.fromkeys((law.multiplier, 1.0)):
            kept = "" if multiplier == 1.0 else "; its factor on cosine and sine is kept"
            yield (
                replace(law, scaling={"rope_type": "default"}, multiplier=multiplier),
                "rope_scaling_ignored",
                f"the {kind} scaling of the frequencies is ignored{kept}",
                f"implement rope_type {kind!r} with the config's rope_scaling",
                {"rope_type": kind, "multiplier": multiplier},
                0,
            )
        told = float(law.scaling.get("factor") or 1.0)
        for factor in _FACTORS:
            if factor != told:
                yield (
                    replace(law, scaling={**law.scaling, "factor": factor}),
                    "rope_scaling_factor",
                    f"the frequencies are scaled by {factor:g} instead of {told:g}",
                    "read rope_scaling.factor of the config (or derive it: max / original_max_position_embeddings)",
                    {"factor": factor, "expected": told},
                    0,
                )
        for other in ("linear", "yarn", "llama3"):
            if other != kind:
                yield (
                    replace(law, scaling={**law.scaling, "rope_type": other}),
                    "rope_scaling_kind",
                    f"the frequencies are scaled as {other}, not as {kind}",
                    f"implement rope_type {kind!r}",
                    {"rope_type": other, "expected": kind},
                    0,
                )
    else:
        for factor in _FACTORS:
            yield (
                replace(law, scaling={"rope_type": "linear", "factor": factor}),
                "rope_scaling_added",
                f"positions are divided by {factor:g}, which the config does not ask for",
                "do not scale the rotary embedding of this model",
                {"factor": factor},
                0,
            )
    yield from _multipliers(scene, law, sine)
    for shift in (-2.0, -1.0, 1.0, 2.0):
        yield (
            replace(law, shift=shift),
            "position_offset",
            f"positions are off by {shift:+g}",
            "check how position ids are counted from the cache length and the padding",
            {"shift": shift},
            0,
        )
    if law.layout != _ONCE:
        yield (
            replace(law, layout=_PAIRS if law.layout == _HALF else _HALF),
            "rope_layout",
            f"frequencies are laid out as {'neighbouring pairs' if law.layout == _HALF else 'two halves'}",
            "use the layout that the weights were trained with, in cos/sin and in the rotation alike",
            {},
            0,
        )
    for dim in dict.fromkeys((scene.runs.config.head_dim or law.dim, 2 * law.dim, law.dim // 2)):
        if dim != law.dim:
            yield (
                replace(law, frequency_dim=dim),
                "rope_partial",
                f"the frequencies are those of {dim} rotated dimensions, not {law.dim}",
                "compute inv_freq for the rotated dimensions (head_dim * partial_rotary_factor)",
                {"dimensions": dim, "expected": law.dim},
                0,
            )
    for low in (ml_dtypes.bfloat16, np.float16):
        name = np.dtype(low).name
        yield (
            replace(law, low=low),
            "rope_low_precision",
            f"positions are multiplied with the frequencies in {name}",
            "keep position ids, inv_freq and their product in float32, and cast cos and sin at the end",
            {"dtype": name},
            0,
        )
        if law.multiplier != 1.0:
            yield (
                replace(law, narrow=low),
                "rope_late_scaling",
                f"cosine and sine are cast to {name} before they are multiplied by {law.multiplier:.5g}",
                "multiply in float32, then cast",
                {"dtype": name, "multiplier": law.multiplier},
                0,
            )


def _bases(scene: Scene, law: Rotary, sine: bool) -> Iterator[_Variant]:
    """Other bases: the usual ones, and the one that fits best."""
    positions = scene.positions.astype(np.float64)

    def misfit(log_base: float) -> float:
        return float(np.linalg.norm(replace(law, base=math.exp(log_base))(positions, sine) - scene.target))

    usual = min(_BASES, key=lambda base: misfit(math.log(base)))
    near = math.log(usual)
    fitted = minimize_scalar(misfit, bounds=(near - _REACH, near + _REACH), method="bounded", options={"xatol": 1e-6})
    odd = abs(math.log(usual / law.base)) < 1e-3 or misfit(float(fitted.x)) < misfit(near) / _CLEARLY
    base, numbers = (math.exp(float(fitted.x)), 1) if odd else (usual, 0)
    if abs(math.log(base / law.base)) >= 1e-3:
        yield (
            replace(law, base=base),
            "rope_base",
            f"the rotary base is {base:.6g} instead of {law.base:.6g}",
            f"pass rope_theta = {law.base:g} of the config",
            {"base": base, "expected": law.base},
            numbers,
        )


def _multipliers(scene: Scene, law: Rotary, sine: bool) -> Iterator[_Variant]:
    plain = replace(law, multiplier=1.0)(scene.positions.astype(np.float64), sine)
    square = float(np.square(plain).sum())
    fitted = float((plain * scene.target).sum()) / square if square else law.multiplier
    for multiplier, numbers in ((1.0, 0), (law.multiplier**2, 0), (fitted, 1)):
        if abs(multiplier / law.multiplier - 1) < 1e-3 or (numbers and abs(multiplier - 1) < 1e-3):
            continue
        yield (
            replace(law, multiplier=multiplier),
            "rope_multiplier",
            f"cosine and sine are multiplied by {multiplier:.5g} instead of {law.multiplier:.5g}",
            "apply the attention factor (0.1 ln(factor) + 1 for YaRN) to cosine and sine once, before the cast",
            {"multiplier": multiplier, "expected": law.multiplier},
            numbers,
        )


def _restarted(scene: Scene, law: Rotary, sine: bool) -> Iterator[Prediction]:
    """Positions counted from the start of the phase instead of the prompt, or stuck at one value."""
    if scene.phase != "decode":
        return
    lengths = {p.prompt: p.n_tokens for p in scene.runs.trace.manifest(scene.runs.reference).prompts}
    length = np.array([lengths.get(int(prompt), 0) for prompt in scene.rows.prompts], np.float64)
    for positions, summary in (
        (scene.positions - length, "positions of decoded tokens are counted from 0 again"),
        (length, "all decoded tokens have the position of the first"),
        (length - 1, "all decoded tokens have the position of the prompt's last token"),
        (np.zeros_like(length), "all decoded tokens have position 0"),
    ):
        yield Prediction(
            "position_offset",
            law(positions, sine),
            summary,
            "pass the position of every decoded token: the cache's length before the step",
        )


FAMILIES = (rotary,)
