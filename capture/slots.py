"""Finding the tensors in whatever a module takes or returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


def tensor_slots(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(slot, tensor)` for every tensor in nested tuples, lists, mappings and dataclasses.

    A slot is the path to the tensor: empty for a bare tensor, `0` for an element of a tuple, `hidden_states` for a
    field of a dataclass or a key of a mapping, joined by dots when nested (`past.0.1`). Objects of other classes,
    such as key-value caches, are not looked into.
    """
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensor_slots(item, _join(prefix, str(key)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensor_slots(getattr(value, field.name), _join(prefix, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        names = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            yield from tensor_slots(item, _join(prefix, names[index] if names else str(index)))


def with_tensors(value: Any, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> Any:
    """The same nested value with other tensors in some slots, named as `tensor_slots` names them."""
    if isinstance(value, torch.Tensor):
        return tensors.get(prefix, value)
    kind: Any = type(value)
    if not any(slot == prefix or slot.startswith(f"{prefix}.") or not prefix for slot in tensors):
        return value
    if isinstance(value, Mapping):
        items = {key: with_tensors(item, tensors, _join(prefix, str(key))) for key, item in value.items()}
        return kind(**items) if dataclasses.is_dataclass(value) else kind(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: with_tensors(getattr(value, name), tensors, _join(prefix, name)) for name in names}
        return dataclasses.replace(value, **changed)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        names = getattr(value, "_fields", None) or [str(index) for index in range(len(value))]
        parts = [with_tensors(item, tensors, _join(prefix, name)) for item, name in zip(value, names, strict=True)]
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    return value


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
