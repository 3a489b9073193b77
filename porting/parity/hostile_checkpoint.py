"""The checkpoint that a port is checked with: hostile weights, packed as the model's are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...capture.packed import BLOCKS, E8M0_BIAS, FP4_VALUES, MXFP4, SCALES, spread
from ..spec.architecture import Architecture, Packing

#: Rows and columns that share a scale: not square, and no divisors of every size.
BLOCK = (32, 48)
_PER_BLOCK = 32
_ROOT_MEAN_SQUARE = math.sqrt(sum(value * value for value in FP4_VALUES) / len(FP4_VALUES))
_WEIGHTS = "model.safetensors"


def save_checkpoint(model: Any, architecture: Architecture, folder: Path, seed: int = 0) -> None:
    """Write a model's weights, packed as the architecture says.

    Packing changes them: the model that the checkpoint holds is the one that is loaded from it. Blocks of 4-bit floats
    and their powers of two are drawn at random; FP8 and INT8 numbers are the weights over random scales.

    Args:
        model: a small model in FP32.
        architecture: its description.
        folder: receives the checkpoint.
        seed: of what is drawn.
    """
    model.save_pretrained(folder)
    packing = architecture.packing
    if packing is None:
        return
    generator = torch.Generator().manual_seed(seed)
    state = load_file(folder / _WEIGHTS)
    for name in list(_packable(model, architecture, state)):
        weight = state.pop(name)
        if packing.kind == MXFP4:
            state[f"{name}{BLOCKS}"], state[f"{name}{SCALES}"] = _random_mxfp4(weight.shape, generator)
        else:
            state[name], state[f"{name}{packing.scale}"] = _scaled(weight, packing, generator)
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _configuration(packing)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _configuration(packing: Packing) -> dict[str, Any]:
    if packing.kind == MXFP4:
        return {"quant_method": MXFP4}
    if packing.rows is None:
        return {"quant_method": "compressed-tensors"}
    return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}


def _packable(model: Any, architecture: Architecture, state: dict[str, torch.Tensor]) -> Iterator[str]:
    """Weights that such checkpoints pack: experts that lie in one tensor, or the projections of layers."""
    modules = dict(model.named_modules())
    for name, weight in state.items():
        if architecture.packing is not None and architecture.packing.kind == MXFP4:
            if weight.ndim == 3:
                yield name
        elif weight.ndim == 2 and name.startswith(f"{architecture.layer.path}.") and name.endswith(".weight"):
            module = modules.get(name.removesuffix(".weight"))
            if module is None or isinstance(module, torch.nn.Linear):
                yield name


def _random_mxfp4(shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes whose weights of (expert, input, output) are about as large as a projection's."""
    experts, inputs, outputs = shape
    n_blocks = inputs // _PER_BLOCK
    blocks = torch.randint(256, (experts, outputs, n_blocks, _PER_BLOCK // 2), generator=generator, dtype=torch.uint8)
    usual = E8M0_BIAS + round(math.log2(1 / (math.sqrt(inputs) * _ROOT_MEAN_SQUARE)))
    scales = torch.randint(usual - 1, usual + 2, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
    return blocks, scales


def _scaled(weight: torch.Tensor, packing: Packing, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit numbers and the scales that give about the weight: FP8 in blocks, INT8 by row."""
    blocks = packing.rows is not None
    counts = [-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True)] if blocks else [weight.shape[0], 1]
    dtype = torch.float8_e4m3fn if blocks else torch.int8
    largest = torch.finfo(dtype).max if blocks else torch.iinfo(dtype).max
    scales = weight.abs().max() / largest * (1 + torch.rand(counts, generator=generator))
    numbers = weight / spread(scales, weight.shape, BLOCK, "scales")
    return (numbers if blocks else numbers.round()).to(dtype), scales
