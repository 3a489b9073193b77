"""Norms of queries and keys: which modules, over which features, before or after the rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from ...store.errors import InputError
from .architecture import Norm, QueryKeyNorm
from .expressions import Expressions
from .norms import analyse_norm, is_norm
from .observation import Call, Observation, source_line
from .sources import Sources
from .wiring import same

Found = tuple[QueryKeyNorm | None, torch.Tensor, torch.Tensor]
_FIELD = "attention.query_key_norm"


class QueryKeyNorms:
    """Finds the norms of one attention module."""

    def __init__(self, seen: Observation, path: str, numbers: Expressions, sources: Sources) -> None:
        """Look at the norms that were called inside it.

        Args:
            seen: the observed model.
            path: of the attention module.
            numbers: expressions over the configuration.
            sources: receives where fields come from.
        """
        self._path, self._numbers, self._sources = path, numbers, sources
        self._module = seen.model.get_submodule(path)
        self._calls = [c for c in seen.inside(path) if is_norm(c.module) or _is_list_of_norms(c.module)]
        whole = seen.call(path).input
        self._shape = (whole.shape[0], whole.shape[1])

    def before(self, query: torch.Tensor, key: torch.Tensor) -> Found:
        """The norms of projected queries and keys, and what they return; the same tensors without norms.

        Args:
            query: (batch, heads, positions, features).
            key: likewise.

        Raises:
            InputError: only one of the two is normalised, or differently.
        """
        on_query, on_key = self._applied_to(query), self._applied_to(key)
        if on_query is None and on_key is None:
            return None, query, key
        if on_query is None or on_key is None:
            raise InputError(f"unsupported: a norm on queries or keys only at {self._path}")
        (one, normed), (other, normed_key) = on_query, on_key
        return self._described(one, other, query.shape[1], after=False), normed, normed_key

    def after(self, query: torch.Tensor, key: torch.Tensor) -> Found:
        """The norms whose outputs are the final queries and keys, and what they are given."""
        heads, kv_heads = query.shape[1], key.shape[1]
        for one in self._calls:
            for other in self._calls:
                outputs = (self._as_heads(one.output, heads), self._as_heads(other.output, kv_heads))
                if one is not other and same(outputs[0], query) and same(outputs[1], key):
                    norm = self._described(one, other, heads, after=True)
                    return norm, self._as_heads(one.input, heads), self._as_heads(other.input, kv_heads)
        return None, query, key

    def _applied_to(self, tensor: torch.Tensor) -> tuple[Call, torch.Tensor] | None:
        heads = tensor.shape[1]
        for call in self._calls:
            if call.input.numel() == tensor.numel() and same(self._as_heads(call.input, heads), tensor):
                return call, self._as_heads(call.output, heads)
        return None

    def _as_heads(self, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """(batch, positions, heads, features) or flat as (batch, heads, positions, features)."""
        batch, length = self._shape
        if tensor.ndim == 4 and tensor.shape[1:3] == (heads, length):
            return tensor
        if tensor.numel() % (batch * length * heads):
            return tensor
        return tensor.reshape(batch, length, heads, -1).transpose(1, 2)

    def _described(self, one: Call, other: Call, heads: int, *, after: bool) -> QueryKeyNorm:
        names = [call.path.removeprefix(f"{self._path}.") for call in (one, other)]
        found = [self._norm_of(call) for call in (one, other)]
        if found[0] != found[1]:
            raise InputError(f"unsupported: different norms on queries and keys at {self._path}")
        line = source_line(self._module, f"self.{names[0]}(")
        self._sources.measured(f"{_FIELD}.scope", "shapes of its input and weight", line)
        self._sources.measured(f"{_FIELD}.after_rotary", "its input", line)
        return QueryKeyNorm(names[0], names[1], found[0], self._scope(one, heads), after, _list_name(one.module))

    def _norm_of(self, call: Call) -> Norm:
        module = call.module
        if _is_list_of_norms(module):
            module = next(m for m in module.modules() if is_norm(m))
        weight = getattr(module, "weight", None)
        width = tuple(weight.shape) if weight is not None else (call.input.shape[-1],)
        return analyse_norm(module, width, self._numbers, self._sources, f"{_FIELD}.norm", call.path)

    def _scope(self, call: Call, heads: int) -> str:
        weight = getattr(call.module, "weight", None)
        if _is_list_of_norms(call.module) or (weight is not None and weight.ndim == 2):
            return "heads"
        flat = call.input.ndim == 3 and heads > 1
        return "width" if flat else "head"


def _is_list_of_norms(module: Any) -> bool:
    return bool(_list_name(module))


def _list_name(module: Any) -> str:
    """Name of the list in a module that holds one norm per head and nothing else; empty for other modules."""
    children = list(module.named_children())
    if len(children) != 1 or list(module.parameters(recurse=False)):
        return ""
    name, inner = str(children[0][0]), children[0][1]
    return name if isinstance(inner, torch.nn.ModuleList) and all(is_norm(m) for m in inner) else ""
