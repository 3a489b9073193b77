"""Checkpoints with packed weights: which weights are packed, and the numbers that they stand for.

Two ways to pack are known:

- `mxfp4`: `X_blocks` and `X_scales` (bytes) hold experts' weights as 4-bit floats (E2M1), two per byte, the lower half
  first, and one power of two (E8M0) for every 32 along the input (OCP Microscaling Formats 1.0). X itself is
  (expert, input, output), the blocks are (expert, output, block, 16).
- scales: `X.weight` holds FP8 or INT8 numbers, `X.weight_scale_inv` or `X.weight_scale` what they are multiplied by:
  one scale for the weight, one per row, or one per block of rows and columns.

transformers unpacks on some accelerators only; here it happens anywhere, in FP32. Anything else that is packed (group
offsets, 4-bit integers) has tensors of other names, which no model knows: it is refused there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..store.errors import InputError

#: Numbers of a 4-bit float with 2 bits of exponent and 1 of mantissa, by their bits.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Exponent of the scale that is stored as 0.
E8M0_BIAS = 127
BLOCKS, SCALES = "_blocks", "_scales"
#: What scales of a weight are called, after the weight's own name.
SCALE_SUFFIXES = ("_scale_inv", "_scale")
MXFP4, SCALED = "mxfp4", "scaled"
ROWS, BLOCKS_OF_BOTH = "rows", "blocks"


@dataclass(frozen=True)
class PackedWeight:
    """A weight that a checkpoint holds packed.

    Attributes:
        name: of the weight that is meant.
        kind: `mxfp4` or `scaled`.
        values: name of the packed numbers.
        scales: name of what they are multiplied by.
    """

    name: str
    kind: str
    values: str
    scales: str


def packed_weights(names: Sequence[str]) -> list[PackedWeight]:
    """The packed weights among the names of a checkpoint, in the order of the names."""
    known = set(names)
    found = []
    for name in names:
        plain = name.removesuffix(BLOCKS)
        if plain != name and f"{plain}{SCALES}" in known:
            found.append(PackedWeight(plain, MXFP4, name, f"{plain}{SCALES}"))
        if name.endswith(".weight"):
            scales = [f"{name}{suffix}" for suffix in SCALE_SUFFIXES]
            found += [PackedWeight(name, SCALED, name, scale) for scale in scales if scale in known]
    return found


def plain_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape by name of the weights that a checkpoint stands for.

    Args:
        shapes: of what it holds.

    Raises:
        InputError: blocks are no blocks of experts.
    """
    plain = dict(shapes)
    for weight in packed_weights(tuple(shapes)):
        values = plain.pop(weight.values)
        del plain[weight.scales]
        if weight.kind == MXFP4:
            if len(values) != 4 or values[:-1] != shapes[weight.scales]:
                raise InputError(
                    f"unsupported: {weight.values} has shape {list(values)}, which is no blocks of experts"
                )
            values = (values[0], values[2] * values[3] * 2, values[1])
        plain[weight.name] = values
    return plain


def unpacked(state: Mapping[str, torch.Tensor], block: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, the packed ones in FP32.

    Args:
        state: tensors by name.
        block: rows and columns that share a scale, where scales are blocks' (`weight_block_size` of a
            configuration).

    Raises:
        InputError: scales fit neither rows nor blocks.
    """
    plain = dict(state)
    for weight in packed_weights(tuple(state)):
        values, scales = plain.pop(weight.values), plain.pop(weight.scales)
        if weight.kind == MXFP4:
            plain[weight.name] = from_mxfp4(values, scales)
        else:
            plain[weight.name] = values.float() * spread(scales, values.shape, block, weight.scales)
    return plain


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Experts' weights, (expert, input, output) in FP32.

    Args:
        blocks: (expert, output, block, 16) bytes.
        scales: (expert, output, block) bytes.
    """
    numbers = torch.tensor(FP4_VALUES)
    pairs = torch.stack((numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]), dim=-1)
    scaled = torch.ldexp(pairs.flatten(-2), (scales.int() - E8M0_BIAS).unsqueeze(-1))
    return scaled.flatten(-2).transpose(1, 2).contiguous()


def spread(scales: torch.Tensor, shape: Sequence[int], block: Sequence[int] | None, name: str) -> torch.Tensor:
    """Scales in FP32, in a shape that multiplies a weight.

    Args:
        scales: one (of any shape), one per row, (rows,) or (rows, 1), or (blocks of rows, blocks of columns); the
            last blocks may be cut off.
        shape: (rows, columns) of the weight.
        block: rows and columns of a block.
        name: of the scales, for the message.

    Raises:
        InputError: they fit neither.
    """
    scales = scales.float()
    if scale_layout(tuple(scales.shape), shape, block, name) == ROWS:
        return scales.reshape(-1, *(1 for _ in shape[1:]))
    for axis, (size, count) in enumerate(zip(block or (), shape, strict=True)):
        scales = scales.repeat_interleave(size, dim=axis).narrow(axis, 0, count)
    return scales


def scale_layout(scales: Sequence[int], shape: Sequence[int], block: Sequence[int] | None, name: str) -> str:
    """What scales of a shape are for: `rows` (one for each, or a single one) or `blocks`.

    Args:
        scales: their shape.
        shape: (rows, columns) of the weight.
        block: rows and columns of a block.
        name: of the scales, for the message.

    Raises:
        InputError: they fit neither.
    """
    rows = shape[0]
    if math.prod(scales) == 1 or tuple(scales) in ((rows,), (rows, 1)):
        return ROWS
    if (
        block is not None
        and len(shape) == 2
        and list(scales) == [-(-n // b) for n, b in zip(shape, block, strict=True)]
    ):
        return BLOCKS_OF_BOTH
    raise InputError(
        f"unsupported: {name} has shape {list(scales)}, which is no scale per row of {list(shape)} and none per "
        f"block of {list(block) if block else 'a size that the configuration names (weight_block_size)'}"
    )


def block_size(config: Any) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale, None where a configuration names none."""
    size = packing_of(config).get("weight_block_size")
    return (int(size[0]), int(size[1])) if size else None


def packing_of(config: Any) -> dict[str, Any]:
    """What a configuration says about packed weights, as a dictionary; empty without."""
    found = getattr(config, "quantization_config", None)
    return dict(found if isinstance(found, dict) else found.to_dict()) if found else {}
