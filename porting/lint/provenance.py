"""Which checkpoint tensors a tensor was computed from, followed through torch operations on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..structure.meta import OnMeta


class Provenance(OnMeta):  # type: ignore[no-untyped-call]
    """While active, remembers for every tensor's storage the checkpoint keys that went into it.

    Tensors that were seen are kept alive, so that a storage's identity is not given to another one: use it for tensors
    without data.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        """`weights` are the checkpoint's tensors by key."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: dict[int, set[str]] = {}
        self._kept: list[torch.Tensor] = []
        for key, weight in weights.items():
            self._add(weight, {key})

    def sources(self, tensor: torch.Tensor) -> frozenset[str]:
        """Keys that went into a tensor, or into any other view of its storage."""
        return frozenset(self._sources.get(_identity(tensor), ()))

    def _add(self, tensor: torch.Tensor, keys: set[str]) -> None:
        identity = _identity(tensor)
        if identity not in self._sources:
            self._kept.append(tensor)
            self._sources[identity] = set()
        self._sources[identity] |= keys

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchDispatchMode`."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        keys: set[str] = set()
        for tensor in _tensors((args, kwargs or {})):
            keys |= self._sources.get(_identity(tensor), set())
        for tensor in _tensors(result):
            self._add(tensor, keys)
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    yield from (item for item in tree_leaves(value) if isinstance(item, torch.Tensor))


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
