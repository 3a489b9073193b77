"""The module tree of a model: classes, parameter shapes, counts and scalar attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

#: Attributes that number a layer: they differ between layers that are alike.
_NUMBERING = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "idx"})
_LONGEST = 16


@dataclass(frozen=True)
class ModuleNode:
    """One module.

    Attributes:
        name: its name in its parent; empty for the root.
        path: its dotted path.
        cls: name of its class.
        origin: module that defines the class.
        parameters: shapes of its own parameters by name.
        attributes: its own scalar attributes (numbers, text, dtypes, names of functions) by name.
        children: its child modules, in order.
    """

    name: str
    path: str
    cls: str
    origin: str
    parameters: dict[str, tuple[int, ...]]
    attributes: dict[str, Any]
    children: tuple[ModuleNode, ...] = field(default=())

    @property
    def n_own(self) -> int:
        """Number of values in its own parameters."""
        return sum(_product(shape) for shape in self.parameters.values())

    @property
    def n_parameters(self) -> int:
        """Number of values in its parameters and those of modules below it; shared ones count everywhere."""
        return self.n_own + sum(child.n_parameters for child in self.children)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two modules must share to be alike: class, shapes, attributes, and all that below them."""
        attributes = tuple(sorted((k, repr(v)) for k, v in self.attributes.items() if k not in _NUMBERING))
        below = tuple((child.name, child.signature) for child in self.children)
        return self.cls, self.origin, tuple(self.parameters.items()), attributes, below

    def walk(self) -> Iterator[ModuleNode]:
        """The module and all below it, in definition order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Group:
    """Children that are alike, or one child.

    Attributes:
        label: `self_attn`, or `[0-3,5]` for numbered children that are alike.
        count: how many.
        node: the first of them.
        groups: its children, grouped.
    """

    label: str
    count: int
    node: ModuleNode
    groups: tuple[Group, ...]


def build_tree(model: torch.nn.Module, name: str = "", path: str = "") -> ModuleNode:
    """The tree of a model, which may be on the meta device."""
    return ModuleNode(
        name,
        path,
        type(model).__name__,
        type(model).__module__,
        {key: tuple(value.shape) for key, value in model._parameters.items() if value is not None},
        dict(_scalars(model)),
        tuple(
            build_tree(child, key, f"{path}.{key}" if path else key)
            for key, child in model._modules.items()
            if child is not None
        ),
    )


def compress(node: ModuleNode) -> tuple[Group, ...]:
    """The children of a module, with numbered ones that are alike in every class, shape and attribute as one group."""
    numbered: dict[tuple[Any, ...], list[ModuleNode]] = {}
    order: list[list[ModuleNode]] = []
    for child in node.children:
        if child.name.isdigit():
            alike = numbered.setdefault(child.signature, [])
            if not alike:
                order.append(alike)
            alike.append(child)
        else:
            order.append([child])
    return tuple(
        Group(_label([child.name for child in alike]), len(alike), alike[0], compress(alike[0])) for alike in order
    )


def _label(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = [int(name) for name in names]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "[" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "]"


def _scalars(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Scalar attributes of a module; flags of torch itself and private names are left out."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if value is None or isinstance(value, (bool, int, float, str)):
            yield name, value
        elif isinstance(value, torch.dtype):
            yield name, str(value)
        elif isinstance(value, (tuple, list)) and len(value) <= _LONGEST and all(_is_number(item) for item in value):
            yield name, list(value)
        elif callable(value) and not isinstance(value, torch.nn.Module) and hasattr(value, "__name__"):
            yield name, value.__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
