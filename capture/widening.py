"""FP32 runs of models whose FP32 weights do not fit in memory: every layer is widened when it runs, then let go.

Checkpoints hold 16-bit weights as a rule. In the dtype in which they are stored, transformers maps them from their
files without a copy, so that the operating system reads them when they are needed and drops them when memory is short.
What computes in FP32 is one layer at a time: its weights are widened before its forward and forgotten after it.
Widening is exact, so every value is the one that the model loaded in FP32 would compute.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch

from ..store.errors import InputError

#: Share of the free memory that a model's weights may take before they are widened layer by layer.
_FREE = 0.7
_HEADER = struct.Struct("<Q")
_WIDENED: WeakKeyDictionary[torch.nn.Module, torch.dtype] = WeakKeyDictionary()


def widen_by_layer(
    model: torch.nn.Module, dtype: torch.dtype, build: Callable[[torch.dtype], torch.nn.Module]
) -> torch.nn.Module:
    """Let a model compute in a wider dtype than that of its weights, one layer at a time.

    A layer is an element of a list of modules (what it contains included); every module outside of lists that has
    parameters of its own counts as one too. Buffers are small, and widened for good; those that are no part of a
    checkpoint are computed anew, since the model made them in the narrower dtype.

    Args:
        model: with its weights in the dtype in which they are stored.
        dtype: the wider one.
        build: makes the model in a dtype, with any weights; its parameters take no memory.
    """
    with _parameters_without_values():
        computed = dict(build(dtype).named_buffers())
    stored = model.state_dict().keys()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype) if full in stored else computed[full]
    for module in model.modules():
        if isinstance(getattr(type(module), "dtype", None), property):
            _says_it_computes_in(module, dtype)
    for unit, recurse in dict(_units(model)).items():
        parameters = [p for p in unit.parameters(recurse=recurse) if p.is_floating_point() and p.dtype != dtype]
        if parameters:
            _Widened(parameters, dtype).attach(unit)
    _WIDENED[model] = dtype
    return model


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Parameters of modules that are built inside have shapes only; buffers are computed."""
    register = torch.nn.Module.register_parameter

    def without_values(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with patch.object(torch.nn.Module, "register_parameter", without_values):
        yield


def computes_in(model: torch.nn.Module) -> torch.dtype | None:
    """The dtype in which a model computes whose weights are widened by layer; None for any other."""
    return _WIDENED.get(model)


def is_too_large(folder: Path, dtype: torch.dtype) -> bool:
    """Whether weights are stored in a narrower dtype than this, and would take most of the free memory in it.

    False where that cannot be told: weights in another format than safetensors, or a system that does not say how
    much memory is free.

    Raises:
        InputError: a file of weights is damaged.
    """
    free = _free_memory()
    stored = [header for file in sorted(folder.glob("*.safetensors")) for header in _headers(file)]
    elements = sum(math.prod(header["shape"]) for header in stored)
    narrow = any(header["dtype"] in ("BF16", "F16") for header in stored)
    return free is not None and narrow and elements * dtype.itemsize > _FREE * free


class _Widened:
    """Parameters that are wide while the module that holds them runs."""

    def __init__(self, parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        self._stored: list[torch.Tensor] = []
        self._depth = 0

    def attach(self, module: torch.nn.Module) -> None:
        """Widen before the module's forward, and let go after it, whether it returns or raises."""
        module.register_forward_pre_hook(self._enter, prepend=True)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._stored = [parameter.data for parameter in self._parameters]
            for parameter, stored in zip(self._parameters, self._stored, strict=True):
                parameter.data = stored.to(self._dtype)

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            for parameter, stored in zip(self._parameters, self._stored, strict=True):
                parameter.data = stored
            self._stored = []


def _says_it_computes_in(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let a model of transformers answer with the wider dtype: it makes masks of it, and would ask its weights."""
    kind = type(module)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), {**names, "dtype": property(lambda _: dtype)})


def _units(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, bool]]:
    """Modules whose parameters are widened together, and whether what they contain belongs to them."""
    for module in model.children():
        if isinstance(module, torch.nn.ModuleList):
            yield from ((layer, True) for layer in module)
        else:
            yield from _units(module)
    if model._parameters:
        yield model, False


def _headers(file: Path) -> Iterator[dict[str, Any]]:
    """Dtype and shape of every tensor in a safetensors file."""
    try:
        with file.open("rb") as stream:
            (size,) = _HEADER.unpack(stream.read(_HEADER.size))
            header = json.loads(stream.read(size))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{file} is damaged: its header cannot be read; download the checkpoint again") from error
    yield from (entry for name, entry in header.items() if name != "__metadata__")


def _free_memory() -> int | None:
    """Bytes of memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
