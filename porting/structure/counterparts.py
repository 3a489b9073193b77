"""The component mapping of two module trees, by names and widths: no forward pass, no values.

Names are compared by the rules that comparisons use, so that what is mapped here is what `sleuth map` would map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...analyze.component_export import export_components
from ...analyze.mapping import map_by_name
from ...analyze.pairs import SiteMapping
from ...analyze.sites import Site, SiteInfo
from .tree import ModuleNode

#: Attributes that hold the width of a module's output, for modules without a weight that tells it.
_WIDTHS = ("out_features", "output_size")


@dataclass(frozen=True)
class TreeMapping:
    """Which modules of a source correspond to which of a target.

    Attributes:
        mapping: pairs and gaps; a site stands for a module's main output.
        source: sites of the source in definition order.
        target: sites of the target.
    """

    mapping: SiteMapping
    source: tuple[SiteInfo, ...]
    target: tuple[SiteInfo, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Paths of source and target modules that correspond."""
        return [(pair.reference.module, pair.target.module) for pair in self.mapping.pairs]

    def as_component_mapping(self) -> dict[str, Any]:
        """In the form of component_mapping.json, which `sleuth compare --mapping` reads."""
        return export_components(self.mapping, self.source, self.target)


def map_trees(source: ModuleNode, target: ModuleNode) -> TreeMapping:
    """Map the modules of a model to those of its port.

    Args:
        source: tree of the Hugging Face model.
        target: tree of the port.
    """
    first, second = tuple(_sites(source)), tuple(_sites(target))
    return TreeMapping(map_by_name(first, second), first, second)


def _sites(tree: ModuleNode) -> Iterator[SiteInfo]:
    for order, node in enumerate(tree.walk()):
        if node.path and node.cls not in ("ModuleList", "ModuleDict", "ParameterList"):
            yield SiteInfo(Site(node.path), order, _width(node), True, (), node.path, 1, 0)


def _width(node: ModuleNode) -> int | None:
    """Features of a module's output: of projections, embeddings and norms; None for containers and activations."""
    for name in _WIDTHS:
        if isinstance(node.attributes.get(name), int):
            return int(node.attributes[name])
    weight = node.parameters.get("weight")
    if weight is None or len(weight) > 2:
        return None
    return weight[1] if len(weight) == 2 and "Embedding" in node.cls else weight[0]
