"""How a port unpacks weights, as the first step of its conversion."""

from __future__ import annotations

from ...capture.packed import FP4_VALUES, MXFP4
from ..spec.packing import Packing

_DTYPE = "neuron_config.torch_dtype"


def unpacking(packing: Packing | None) -> tuple[list[str], list[str]]:
    """Statements at the beginning of the conversion, and functions they call."""
    if packing is None:
        return [], []
    if packing.kind == MXFP4:
        return [f"unpack_mxfp4(state_dict, {_DTYPE})"], [_UNPACK_MXFP4]
    # the library calls `weight_scale` otherwise before it hands the weights over
    scale = f"weight{packing.scale}" if packing.scale != "_scale" else "scale"
    if packing.rows is None or packing.columns is None:
        return [f"unpack_rows(state_dict, {_DTYPE})"], [_rows_source(scale)]
    block = f"({packing.rows.expression}, {packing.columns.expression})"
    return [f"unpack_blocks(state_dict, {_DTYPE}, {block})"], [_blocks_source(scale)]


_UNPACK_MXFP4 = f'''def unpack_mxfp4(state_dict, dtype):
    """Every byte holds two 4-bit floats, the lower half first; every 32 of them share a power of two."""
    numbers = torch.tensor(
        {list(FP4_VALUES)}
    )
    for name in [name for name in state_dict if name.endswith("_blocks")]:
        blocks = state_dict.pop(name)
        exponents = state_dict.pop(name.removesuffix("_blocks") + "_scales").to(torch.int32) - 127
        halves = torch.stack((numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]), dim=-1).flatten(-2)
        weight = torch.ldexp(halves, exponents.unsqueeze(-1)).flatten(-2)
        state_dict[name.removesuffix("_blocks")] = weight.transpose(1, 2).to(dtype).contiguous()'''


def _blocks_source(scale: str) -> str:
    return f'''def unpack_blocks(state_dict, dtype, block):
    """Every block of rows and columns has a scale; the last ones may be cut off."""
    for name in [name for name in state_dict if name.endswith(".{scale}")]:
        weight = name.removesuffix("{scale}") + "weight"
        rows, columns = state_dict[weight].shape
        scales = state_dict.pop(name).float()
        if scales.numel() > 1:
            scales = scales.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
        state_dict[weight] = (state_dict[weight].float() * scales).to(dtype)'''


def _rows_source(scale: str) -> str:
    return f'''def unpack_rows(state_dict, dtype):
    """Every row has a scale, or the whole weight has one."""
    for name in [name for name in state_dict if name.endswith(".{scale}")]:
        weight = name.removesuffix("{scale}") + "weight"
        scales = state_dict.pop(name).float().reshape(-1, 1)
        state_dict[weight] = (state_dict[weight].float() * scales).to(dtype)'''
