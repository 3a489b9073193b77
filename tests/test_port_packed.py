"""Packed checkpoints (MXFP4, FP8 blocks, INT8 rows): their numbers, what the analysis finds, what a port unpacks."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from port_configurations import configuration
from safetensors.torch import load_file, save_file
from tensorsleuth.capture.hf import ModelSource, load_model
from tensorsleuth.capture.packed import (
    E8M0_BIAS,
    MXFP4,
    SCALED,
    block_size,
    from_mxfp4,
    packed_weights,
    plain_shapes,
    spread,
    unpacked,
)
from tensorsleuth.porting.generator.generate import modeling_text
from tensorsleuth.porting.parity.hostile_checkpoint import BLOCK, save_checkpoint
from tensorsleuth.porting.spec.architecture import Architecture, Packing
from tensorsleuth.porting.spec.extract import analyse_config, analyse_model
from tensorsleuth.porting.spec.hostile import hostile_model
from tensorsleuth.store import InputError
from transformers import LlamaConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

_PACKED = {"mxfp4": "gpt_oss-mxfp4", "fp8": "deepseek_v3-fp8", "int8": "qwen3"}


def _architecture(kind: str) -> Architecture:
    found = analyse_config(configuration(_PACKED[kind]))
    return dataclasses.replace(found, packing=Packing(SCALED, "_scale")) if kind == "int8" else found


@pytest.fixture(scope="module", params=_PACKED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Architecture]:
    """A small packed checkpoint and its architecture."""
    architecture = _architecture(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(hostile_model(configuration(_PACKED[request.param])), architecture, folder)
    return folder, architecture


@given(st.integers(0, 2**31), st.sampled_from([(1, 1, 1), (2, 3, 4), (3, 5, 2)]), st.sampled_from([(100, 140), (0, 3)]))
def test_4_bit_floats_are_what_transformers_unpacks(
    seed: int, shape: tuple[int, int, int], exponents: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(*exponents, shape, generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    found = from_mxfp4(blocks, scales)
    assert found.shape == (shape[0], shape[2] * 32, shape[1])
    assert torch.equal(found, expected)


def test_a_byte_holds_its_lower_half_first() -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[..., 0] = 0xF1
    found = from_mxfp4(blocks, torch.full((1, 1, 1), E8M0_BIAS + 3, dtype=torch.uint8))
    assert found[0, :3, 0].tolist() == [4.0, -48.0, 0.0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16))
def test_every_block_has_its_scale_and_the_last_may_be_cut_off(rows: int, columns: int, high: int, wide: int) -> None:
    scales = torch.rand(-(-rows // high), -(-columns // wide)) + 1
    found = torch.ones(rows, columns) * spread(scales, (rows, columns), (high, wide), "scales")
    if scales.shape not in ((rows, 1), (1, 1)):
        row, column = torch.arange(rows) // high, torch.arange(columns) // wide
        assert torch.equal(found, scales[row][:, column])


@pytest.mark.parametrize("shape", [(3,), (7, 2), (2, 2, 1)])
def test_scales_that_fit_nothing_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"unsupported: x\.weight_scale has shape"):
        unpacked({"x.weight": torch.ones(6, 8), "x.weight_scale": torch.ones(shape)})


def test_packing_is_read_from_the_checkpoint(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    found = analyse_model(folder)
    assert found.packing is not None
    assert architecture.packing is not None
    assert dataclasses.replace(found.packing, rows=None, columns=None) == dataclasses.replace(
        architecture.packing, rows=None, columns=None
    )
    if found.packing.rows is not None and found.packing.columns is not None:
        assert (found.packing.rows.value, found.packing.columns.value) == BLOCK
    assert any(source.field == "packing" and "checkpoint: " in source.origin for source in found.sources)


def test_a_packed_checkpoint_loads_as_the_numbers_it_stands_for(checkpoint: tuple[Path, Architecture]) -> None:
    folder, _ = checkpoint
    model = load_model(ModelSource(folder), torch.float32)
    size = BLOCK if any("scale_inv" in name for name in load_file(folder / "model.safetensors")) else None
    state = unpacked(load_file(folder / "model.safetensors"), size)
    assert plain_shapes({n: tuple(t.shape) for n, t in load_file(folder / "model.safetensors").items()}) == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], state[name]) for name in state if name in loaded)
    rounded = load_model(ModelSource(folder), torch.bfloat16)
    assert all(torch.equal(p, loaded[name].bfloat16()) for name, p in rounded.named_parameters())


def _conversion(architecture: Architecture) -> dict[str, Any]:
    """The functions of a port that unpack, without the library that the rest of it imports."""
    tree = ast.parse(modeling_text(architecture))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("unpack_")]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(list(functions), []), "port", "exec"), names)
    return names


def test_a_port_unpacks_what_the_reference_unpacks(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    names = _conversion(architecture)
    (function,) = [value for name, value in names.items() if name.startswith("unpack_")]
    state = load_file(folder / "model.safetensors")
    blocks = BLOCK if architecture.packing is not None and architecture.packing.rows is not None else None
    expected = unpacked(state, blocks)
    # the library renames these before it converts
    given = {name.replace(".weight_scale", ".scale") if "_inv" not in name else name: t for name, t in state.items()}
    function(given, torch.float32, *([blocks] if blocks else []))
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_packing_that_is_not_known_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=100)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(InputError, match="unsupported: weights packed as awq cannot be told from the configuration"):
        analyse_config(config)
    hostile_model(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    rows = state[name].shape[0]
    for extra in ({f"{name}_packed": state[name].clone()}, {f"{name}_zero_point": torch.zeros(rows, 1)}):
        packed = {f"{name}_scale": torch.ones(rows, 1), **extra}
        save_file({**state, **packed}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"unsupported: checkpoint weight {next(iter(extra))} is none of"):
            analyse_model(tmp_path)


def test_only_weights_with_scales_are_packed() -> None:
    names = ["a.weight", "a.weight_scale_inv", "b.weight", "b.bias", "c_blocks", "d_blocks", "d_scales"]
    found = [(weight.name, weight.kind) for weight in packed_weights(names)]
    assert found == [("a.weight", SCALED), ("d", MXFP4)]


def test_the_size_of_blocks_is_the_configurations() -> None:
    assert block_size(configuration("deepseek_v3-fp8")) == (128, 128)
    assert block_size(configuration("gpt_oss-mxfp4")) is None
    assert block_size(configuration("qwen3")) is None
