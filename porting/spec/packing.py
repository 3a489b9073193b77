"""How a checkpoint's weights are packed: read from its names, or from the configuration where there are no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...capture.packed import (
    BLOCKS_OF_BOTH,
    MXFP4,
    SCALE_SUFFIXES,
    SCALED,
    block_size,
    packed_weights,
    packing_of,
    scale_layout,
)
from ...store.errors import InputError
from .facts import Fact, Number


@dataclass(frozen=True)
class Packing(Fact):
    """Weights that a checkpoint does not hold as the numbers that the model multiplies by.

    Attributes:
        kind: `mxfp4` (4-bit floats with a power of two for every 32) or `scaled` (8-bit numbers times scales).
        scale: `scaled`: what scales are called after the weight's own name; empty for others.
        rows: rows of a weight that share a scale; None where every row, or the whole weight, has its own.
        columns: columns that share a scale; None likewise.
    """

    kind: str
    scale: str = ""
    rows: Number | None = None
    columns: Number | None = None


def find_packing(config: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> tuple[Packing | None, str]:
    """The packing of a checkpoint, None where weights are plain; and where that was read.

    Args:
        config: the model's configuration.
        shapes: of the checkpoint's tensors by name; None where only the configuration is there.

    Raises:
        InputError: weights are packed in a way that is not known.
    """
    if shapes is None:
        return _of_config(config)
    found = packed_weights(tuple(shapes))
    if not found:
        return None, ""
    origin = f"checkpoint: {found[0].scales}"
    if {weight.kind for weight in found} == {MXFP4}:
        return Packing(MXFP4), origin
    suffixes = {weight.scales.removeprefix(weight.values) for weight in found}
    block = block_size(config)
    layouts = {
        scale_layout(shapes[weight.scales], shapes[weight.values], block, weight.scales)
        for weight in found
        if weight.kind == SCALED and math.prod(shapes[weight.scales]) > 1
    }
    if len(layouts) > 1 or not suffixes <= set(SCALE_SUFFIXES) or len(suffixes) > 1:
        raise InputError(f"unsupported: weights of the checkpoint are packed in several ways; one is {origin}")
    return _scaled(config, suffixes.pop(), blocks=layouts == {BLOCKS_OF_BOTH}), origin


def _of_config(config: Any) -> tuple[Packing | None, str]:
    packing = packing_of(config)
    method = packing.get("quant_method")
    if not packing:
        return None, ""
    if method == MXFP4:
        return Packing(MXFP4), "config: quantization_config"
    if method == "fp8" and block_size(config) is not None:
        return _scaled(config, SCALE_SUFFIXES[0], blocks=True), "config: quantization_config"
    raise InputError(
        f"unsupported: weights packed as {method} cannot be told from the configuration alone; name the model folder "
        "with its safetensors files, or unpack them"
    )


def _scaled(config: Any, suffix: str, *, blocks: bool) -> Packing:
    if not blocks:
        return Packing(SCALED, suffix)
    size = block_size(config)
    if size is None:
        raise InputError("unsupported: scales are blocks', and the configuration names no weight_block_size")
    key = 'config.quantization_config["weight_block_size"]'
    return Packing(SCALED, suffix, Number(f"{key}[0]", size[0]), Number(f"{key}[1]", size[1]))
