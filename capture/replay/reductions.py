"""Rounding linear maps as a tensor-parallel target does.

A row-parallel projection is split along its input: every rank rounds its partial sum to the model's dtype before the
all-reduce adds them. Parallel projections add their bias after that, to a rounded product. A plain linear map rounds
once. The difference is no fault, but R would be up to sqrt(2) without one. So where the target has such a projection,
the baseline's is computed in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional

from ...analyze.pairs import Pair
from ...store.manifest import RunManifest

_ROW_PARALLEL, _COLUMN_PARALLEL = "RowParallel", "ColumnParallel"


def parallel_linears(pairs: Sequence[Pair], target: RunManifest, ranks: int) -> dict[str, int]:
    """Reference modules whose counterpart in the target is a parallel projection, by the names of its classes.

    Returns:
        By path, the number of parts that its sums are rounded in.
    """
    classes = {module.path: module.cls for module in target.modules}
    found: dict[str, int] = {}
    for pair in pairs:
        kind = classes.get(pair.target.module, "")
        if _ROW_PARALLEL in kind:
            found[pair.reference.module] = ranks
        elif _COLUMN_PARALLEL in kind:
            found.setdefault(pair.reference.module, 1)
    return found


@contextmanager
def rounded_like(model: torch.nn.Module, parts: Mapping[str, int]) -> Iterator[None]:
    """Compute linear modules of a model as sums of rounded parts while the context is open; see `parallel_linears`."""
    changed = []
    for path, module in model.named_modules():
        n = parts.get(path, 0)
        if n and isinstance(module, torch.nn.Linear) and module.in_features % n == 0:
            module.forward = partial(_in_parts, module, n)  # type: ignore[method-assign]
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _in_parts(module: torch.nn.Linear, n: int, hidden: torch.Tensor) -> torch.Tensor:
    """The linear map with parts rounded to the dtype, added in float32 and rounded again; then the bias."""
    total = functional.linear(hidden, module.weight)
    if n > 1:
        parts = zip(hidden.chunk(n, -1), module.weight.chunk(n, 1), strict=True)
        total = torch.stack([functional.linear(part, weight).float() for part, weight in parts]).sum(0).to(total.dtype)
    return total if module.bias is None else total + module.bias
