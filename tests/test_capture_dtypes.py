"""Every dtype of torch is stored bit for bit, or refused by name."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorsleuth.capture.pending import to_numpy
from tensorsleuth.capture.recorder import record
from tensorsleuth.store import Trace, UnsupportedDtypeError
from tensorsleuth.store.dtypes import NUMPY_DTYPES, dtype_name
from tensorsleuth.store.shard_writer import content_of

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORED = sorted(name for name in DTYPES if name in NUMPY_DTYPES)
REFUSED = sorted(set(DTYPES) - set(STORED))
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3), (2, 1, 5), (2, 3, 4, 2), (2, 1, 3, 2, 2)]


class Returns(torch.nn.Module):
    """Returns its arguments."""

    def forward(self, *values: Any) -> tuple[Any, ...]:
        return values


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bit pattern at all: NaNs with payloads, infinities, denormals, negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (int(np.prod(shape)) * size,), dtype=torch.uint8, generator=generator)
    return (raw & 1 if dtype is torch.bool else raw).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().flatten().clone(memory_format=torch.contiguous_format)
    return plain.as_strided(plain.shape, (1,)).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def layouts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself and views of it that torch stores lazily or with other strides."""
    found = [tensor]
    if tensor.ndim >= 2:
        found += [tensor.transpose(0, -1), tensor[:, 1:], tensor.expand(2, *tensor.shape)]
    if tensor.ndim >= 1:
        found += [tensor[::2], tensor[1:]]
    if tensor.is_complex():
        found += [tensor.conj(), tensor.imag, tensor.conj().imag]  # the last one is a negative view
    return found


def test_torch_has_dtypes_of_both_kinds() -> None:
    assert {"float32", "bfloat16", "float8_e5m2", "uint64", "bool", "complex128"} <= set(STORED)
    assert {"qint8", "complex32", "bits8", "float4_e2m1fn_x2"} <= set(REFUSED)


def test_every_accepted_dtype_in_every_shape_and_layout_comes_back_bit_for_bit(trace: Trace, read: Any) -> None:
    tensors = [
        view
        for number, name in enumerate(STORED)
        for shape in SHAPES
        for view in layouts(random_bits(DTYPES[name], shape, number))
    ]
    model = Returns()
    with record(trace, model, run="run", role="reference"):
        model(*tensors)
    expected = [(str(t.dtype).removeprefix("torch."), tuple(t.shape), bits(t)) for t in tensors]
    found = read(trace)
    assert [(tensor.row["dtype"], tensor.values.shape, tensor.values.tobytes()) for tensor in found] == expected
    assert all(tensor.values.dtype == NUMPY_DTYPES[tensor.row["dtype"]] for tensor in found)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.tuples(st.sampled_from(STORED), st.lists(st.integers(0, 5), max_size=5), st.integers(0, 2**31)),
        min_size=1,
        max_size=8,
    )
)
def test_any_shape_of_any_accepted_dtype_becomes_the_same_bits_in_numpy(data: list[Any]) -> None:
    for name, shape, seed in data:
        for view in layouts(random_bits(DTYPES[name], tuple(shape), seed)):
            array = to_numpy(view)
            assert array.shape == tuple(view.shape)
            assert array.flags.c_contiguous
            assert dtype_name(array.dtype) == str(view.dtype).removeprefix("torch.")
            assert array.tobytes() == bits(view)
            content_of(array)


def example_of(dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(2, dtype=dtype)
    except RuntimeError:
        return torch._empty_affine_quantized((2,), scale=1.0, zero_point=0, dtype=dtype)


@pytest.mark.parametrize("name", REFUSED)
def test_other_dtypes_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedDtypeError, match=f"dtype {name} cannot be stored.*accepted: float64"):
        to_numpy(example_of(DTYPES[name]))


def test_refused_tensors_are_listed_in_the_run_and_do_not_stop_it(trace: Trace, read: Any) -> None:
    model = Returns()
    refused = [example_of(DTYPES[name]) for name in REFUSED] + [torch.eye(3).to_sparse()]
    with record(trace, model, run="run", role="reference"):
        model(torch.ones(2), *refused)
    assert [tensor.row["dtype"] for tensor in read(trace)] == ["float32"]
    skipped = trace.manifest("run").provenance["skipped"]
    assert list(skipped) == [f"(root)[{index + 1}]" for index in range(len(refused))]
    for name, reason in zip(REFUSED, skipped.values(), strict=False):
        assert f"dtype {name} cannot be stored" in reason
    assert "layout torch.sparse_coo" in list(skipped.values())[-1]


def test_a_buffer_of_a_refused_dtype_is_listed_and_does_not_stop_the_run(trace: Trace) -> None:
    model = Returns()
    model.register_buffer("half_complex", torch.zeros(2, dtype=torch.complex32))
    with record(trace, model, run="run", role="reference"):
        model(torch.ones(2))
    manifest = trace.manifest("run")
    assert manifest.status == "complete"
    assert list(manifest.provenance["skipped"]) == ["(root):buffer[half_complex]"]


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "float64"])
def test_other_hdf5_programs_read_the_right_floats(trace: Trace, name: str) -> None:
    values = torch.tensor([0.0, -1.5, 0.4375, 2.0, 96.0, 2.0**-6]).to(DTYPES[name])
    model = Returns()
    with record(trace, model, run="run", role="reference"):
        model(values)
    (shard,) = trace.shards("run")
    with h5py.File(shard) as file:
        dataset = file["0:output_0"]
        assert dataset.id.get_type().get_class() == h5py.h5t.FLOAT
        np.testing.assert_array_equal(dataset.astype("float32")[()], values.float().numpy())


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed (package hdf5-tools)")
def test_h5dump_prints_bfloat16_as_numbers(trace: Trace) -> None:
    model = Returns()
    with record(trace, model, run="run", role="reference"):
        model(torch.tensor([0.5, -1.5, 256.0], dtype=torch.bfloat16))
    (shard,) = trace.shards("run")
    shown = subprocess.run(["h5dump", "-d", "/0:output_0", str(shard)], capture_output=True, text=True, check=True)
    assert "0.5, -1.5, 256" in shown.stdout
