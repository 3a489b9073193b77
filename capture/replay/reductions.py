"""Rounding sums over ranks as a tensor-parallel target does.

A row-parallel projection is split along its input: every rank rounds its partial sum to the target's dtype before the
all-reduce adds them. On one rank there is one rounding, on several there are two, and R would be about sqrt(2) in a
port without a fault. So the baseline's projections that are row-parallel in the target are computed in as many parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional

from ...analyze.pairs import Pair
from ...store.manifest import RunManifest

_ROW_PARALLEL = "RowParallel"


def row_parallel(pairs: Sequence[Pair], target: RunManifest) -> frozenset[str]:
    """Reference modules whose counterpart in the target is row-parallel, by the names of its classes."""
    classes = {module.path: module.cls for module in target.modules}
    return frozenset(pair.reference.module for pair in pairs if _ROW_PARALLEL in classes.get(pair.target.module, ""))


@contextmanager
def rounded_like(model: torch.nn.Module, modules: Collection[str], ranks: int) -> Iterator[None]:
    """Compute linear modules of a model as the sum of `ranks` rounded parts while the context is open."""
    changed = [
        module
        for path, module in model.named_modules()
        if path in modules and isinstance(module, torch.nn.Linear) and module.in_features % ranks == 0
    ]
    for module in changed:
        module.forward = partial(_in_parts, module, ranks)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _in_parts(module: torch.nn.Linear, ranks: int, hidden: torch.Tensor) -> torch.Tensor:
    """The linear map as an all-reduce computes it: parts rounded to the dtype, added in float32, rounded again."""
    parts = zip(hidden.chunk(ranks, -1), module.weight.chunk(ranks, 1), strict=True)
    total = sum(functional.linear(part, weight).float() for part, weight in parts)
    assert isinstance(total, torch.Tensor)
    total = total.to(hidden.dtype)
    return total if module.bias is None else total + module.bias
