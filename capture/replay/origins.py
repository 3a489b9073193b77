"""Where the tensors of a forward pass come from: which given values, and whose code they passed through since.

A dispatch mode follows every operator. A view or copy of given values is still those values; anything else was computed
from them by the module whose code ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES = frozenset({"aten::clone", "aten::_to_copy", "aten::_unsafe_view", "aten::detach"})


@dataclass(frozen=True)
class Origin:
    """What a tensor was made of.

    Attributes:
        sites: sites of the other run whose values it was made of.
        code: modules of the reference whose own code (between calls of other modules) worked on them.
        through: modules of the reference whose outputs it depends on, since the other run has no values for these.
        complete: the values cover every position.
    """

    sites: frozenset[str] = frozenset()
    code: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()
    complete: bool = True

    @classmethod
    def union(cls, origins: Iterable[Origin]) -> Origin:
        """Made of several."""
        found = list(origins)
        return cls(
            frozenset().union(*(origin.sites for origin in found)),
            frozenset().union(*(origin.code for origin in found)),
            frozenset().union(*(origin.through for origin in found)),
            all(origin.complete for origin in found),
        )


class OriginTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors while it is entered as a context.

    Attributes:
        running: paths of the modules that are running, the innermost last.
        paused: follow nothing.
    """

    def __init__(self) -> None:
        """Follow nothing yet; `mark` says where it starts."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[str] = []
        self.paused = False
        self._origins: Any = WeakTensorKeyDictionary()

    def of(self, tensor: torch.Tensor) -> Origin | None:
        """Where a tensor comes from; None when no given value is in it."""
        found: Origin | None = self._origins.get(tensor)
        return found

    def mark(self, tensor: torch.Tensor, origin: Origin) -> None:
        """Say where a tensor comes from."""
        self._origins[tensor] = origin

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note what its results were made of."""
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = [origin for tensor in given if (origin := self._origins.get(tensor)) is not None]
        if found:
            origin = found[0] if len(found) == 1 else Origin.union(found)
            if not (len(found) == 1 and (func.is_view or func._schema.name in _COPIES)) and self.running:
                origin = replace(origin, code=origin.code | {self.running[-1]})
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._origins[leaf] = origin
        return result
