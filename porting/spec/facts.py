"""What facts are made of: the base of all, numbers over the configuration, norms."""

from __future__ import annotations

from dataclasses import dataclass


class Fact:
    """Base of everything a spec is made of."""


@dataclass(frozen=True)
class Number(Fact):
    """A number of the architecture.

    Attributes:
        expression: Python over `config`, for example `config.rms_norm_eps` or `1e-05`.
        value: what it is for the analysed model.
    """

    expression: str
    value: float


@dataclass(frozen=True)
class Norm(Fact):
    """A normalisation over the last axis.

    Attributes:
        kind: `rms` (y = x / sqrt(mean(x^2) + eps)) or `layer` (mean subtracted first).
        eps: epsilon inside the root.
        offset: added to the weight: 1 where the checkpoint stores w and the model multiplies by 1 + w.
        weight: whether there is a weight.
        bias: whether there is a bias.
        rounding: where a model in low precision rounds: `normalized` (before the weight), `product` (after it), or
            `native` (as torch's layer_norm).
    """

    kind: str
    eps: Number
    offset: float
    weight: bool
    bias: bool
    rounding: str
