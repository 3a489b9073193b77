"""Which rotary embedding turned queries before into queries after, read off the angles.

A pair of features (a, b) as the complex number a + ib is multiplied by m * exp(i * position * frequency), for every
head alike. The ratio of after to before gives m, the angle, and with it which features are pairs and what the
frequencies are; nothing of the module that computed them is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from .architecture import Number, Rotary
from .expressions import Expressions

#: Largest deviation of a unit phase that counts as rounding: FP32 angles up to a few dozen radians.
_PHASE = 2e-4
_THETA_KEYS = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "rotary_base")
#: Base of models that have no key for it.
_CONSTANT_BASE = "10000.0"
_DIM_EXPRESSIONS = (
    "{head_dim}",
    "int({head_dim} * config.partial_rotary_factor)",
    "int({head_dim} * config.rotary_pct)",
    "config.rotary_dim",
    "config.qk_rope_head_dim",
)


@dataclass(frozen=True)
class Rotation:
    """What happened to the first `dim` features of every head.

    Attributes:
        layout: `half` or `interleaved`.
        dim: features that were rotated.
        phases: exp(i * angle) by position and pair, positions from 0.
        factor: by how much lengths grew.
    """

    layout: str
    dim: int
    phases: torch.Tensor
    factor: float


def find_rotation(before: torch.Tensor, after: torch.Tensor) -> Rotation | None:
    """The rotation between two tensors (batch, heads, positions, features); None when it is none."""
    n = before.shape[-1]
    changed = ((before - after).abs().amax((0, 1, 2)) > 1e-5).nonzero().flatten()
    if not len(changed):
        return None
    lowest = int(changed.max()) + 1
    for dim in sorted({d for d in range(lowest, n + 1) if d % 2 == 0} | {n}):
        for layout in ("half", "interleaved"):
            found = _rotation(before[..., :dim], after[..., :dim], layout)
            if found is not None and not _last_is_still(found):
                return found
    return None


def _last_is_still(rotation: Rotation) -> bool:
    """Whether the slowest pair does not turn at all: then it does not belong to the rotated part."""
    return bool((rotation.phases[:, -1] - 1).abs().max() < 1e-9) and abs(rotation.factor - 1) < 1e-7


def _rotation(before: torch.Tensor, after: torch.Tensor, layout: str) -> Rotation | None:
    z, w = (_pairs(value.double(), layout) for value in (before, after))
    factor = float((w.abs().pow(2).sum() / z.abs().pow(2).sum()).sqrt())
    # the angle that best explains all heads and rows: the sum weighs long pairs more, which rounding hurts less
    sums = (w * z.conj()).sum((0, 1))
    phases = sums / sums.abs().clamp_min(1e-30)
    error = (w - factor * z * phases).norm() / w.norm()
    return Rotation(layout, before.shape[-1], phases, factor) if error < _PHASE else None


def _pairs(values: torch.Tensor, layout: str) -> torch.Tensor:
    half = values.shape[-1] // 2
    if layout == "half":
        return torch.complex(values[..., :half], values[..., half:])
    return torch.complex(values[..., 0::2], values[..., 1::2])


def identify(rotation: Rotation, numbers: Expressions, head_dim: str) -> Rotary | None:
    """The configuration's rotary embedding with the measured angles, None when no formula gives them.

    Args:
        rotation: what was measured on the small model.
        numbers: expressions over the configuration.
        head_dim: expression of the features of a head.
    """
    dim = numbers.find(rotation.dim, [text.format(head_dim=head_dim) for text in _DIM_EXPRESSIONS], only=True)
    if dim is None:
        return None
    bases = [f"config.{key}" for key in _THETA_KEYS if getattr(numbers.small, key, None) is not None]
    for expression in (*bases, _CONSTANT_BASE):
        theta = numbers.value(expression, numbers.small)
        for scaling in (getattr(numbers.small, "rope_scaling", None), None):
            kind = rope_type(scaling)
            for length in (1, None):
                found = frequencies(kind, float(theta), rotation.dim, scaling, numbers.small, length)
                if found is None:
                    continue
                rates, factor = found
                if _matches(rotation, rates) and math.isclose(factor, rotation.factor, rel_tol=1e-4):
                    rotary = Rotary(kind, numbers.number(expression), dim, rotation.layout, factor=1.0)
                    scaled = kind not in ("default",)
                    return replace(rotary, scaling="config.rope_scaling" if scaled else "", factor=factor)
    return None


def rope_type(scaling: Any) -> str:
    """The kind of a `rope_scaling` dictionary."""
    if not scaling:
        return "default"
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _matches(rotation: Rotation, rates: torch.Tensor) -> bool:
    positions = torch.arange(rotation.phases.shape[0], dtype=torch.float64)
    expected = torch.exp(1j * positions[:, None] * rates.double()[None])
    return bool((rotation.phases - expected).abs().max() < 1e-3)


def frequencies(
    kind: str, theta: float, dim: int, scaling: Any, config: Any, length: int | None
) -> tuple[torch.Tensor, float] | None:
    """Radians per position of every pair, and the factor on cosine and sine; None for an unknown kind.

    Formulas: linear scaling divides positions (kaiokendev, 2023); llama3 as in Llama 3.1's release; YaRN as in Peng et
    al., 2023, section 3; longrope as in Ding et al., 2024.

    Args:
        kind: of the scaling.
        theta: base.
        dim: rotated features.
        scaling: its parameters.
        config: the configuration, for position limits.
        length: longrope: number of positions, None for beyond the original limit.
    """
    rates = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "default":
        return rates, 1.0
    if kind == "linear":
        return rates / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(rates, scaling), 1.0
    if kind == "yarn":
        return _yarn(rates, theta, dim, scaling, config)
    if kind == "longrope":
        return _longrope(rates, scaling, config, length)
    return None


def _llama3(rates: torch.Tensor, scaling: Any) -> torch.Tensor:
    original = scaling["original_max_position_embeddings"]
    turns = original * rates / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: torch.Tensor = rates * ((1 - share) / scaling["factor"] + share)
    return slowed


def _yarn(rates: torch.Tensor, theta: float, dim: int, scaling: Any, config: Any) -> tuple[torch.Tensor, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    stretched = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return rates * (stretched / factor + 1 - stretched), yarn_factor(scaling)


def yarn_factor(scaling: Any) -> float:
    """YaRN's factor on cosine and sine (attention temperature)."""
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return temperature(one) / temperature(all_dims) if one and all_dims else temperature(1.0)


def _longrope(rates: torch.Tensor, scaling: Any, config: Any, length: int | None) -> tuple[torch.Tensor, float]:
    factors = scaling["long_factor" if length is None else "short_factor"]
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    stretch = config.max_position_embeddings / original
    given = scaling.get("attention_factor")
    if given is None:
        given = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return rates / torch.tensor(factors, dtype=torch.float64), float(given)


def number_or_none(numbers: Expressions, key: str) -> Number | None:
    """A configuration key as a number, None when it is absent or null."""
    return numbers.number(f"config.{key}") if getattr(numbers.full, key, None) is not None else None
