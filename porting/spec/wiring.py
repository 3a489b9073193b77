"""Explaining a tensor as a sum of others: how a layer is wired, read off its values.

With random weights, the outputs of different modules are linearly independent, so the coefficients of a sum are
unique: least squares finds them, and a residual above rounding means that something else happens in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

#: Relative residual up to which a sum explains a tensor (FP32 arithmetic of a few additions).
_EXPLAINED = 2e-5
_ABSENT = 1e-4
_ONE = 2e-5


@dataclass(frozen=True)
class Summand:
    """One term of a sum: a known tensor's name and its coefficient, exactly 1 where it is one."""

    name: str
    factor: float


def explain(tensor: torch.Tensor, known: Mapping[str, torch.Tensor]) -> tuple[Summand, ...] | None:
    """The sum of known tensors that a tensor is, in the order of `known`; None when it is none.

    A tensor that is reshaped counts as the same: only the number of elements must agree.

    Args:
        tensor: what to explain.
        known: candidates by name.
    """
    for name, candidate in reversed(list(known.items())):
        if candidate.numel() == tensor.numel() and _close(candidate.reshape(-1), tensor.reshape(-1)):
            return (Summand(name, 1.0),)
    names = [name for name, candidate in known.items() if candidate.numel() == tensor.numel()]
    if not names:
        return None
    columns = torch.stack([known[name].reshape(-1).double() for name in names], 1)
    target = tensor.reshape(-1).double()
    found = torch.linalg.lstsq(columns, target).solution
    if not _close(columns @ found, target):
        return None
    summands = [Summand(name, float(factor)) for name, factor in zip(names, found, strict=True)]
    kept = [s for s in summands if abs(s.factor) > _ABSENT]
    return tuple(Summand(s.name, 1.0) if abs(s.factor - 1.0) < _ONE else s for s in kept)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).norm() <= _EXPLAINED * wanted.norm())


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors of one shape agree to rounding."""
    return found.shape == wanted.shape and _close(found.double(), wanted.double())
