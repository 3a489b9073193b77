"""What a compiled graph carries out: TensorCaptureConfig from the options of a capture.

The configuration is fixed when a model is compiled, takes exact module names only and keeps one tensor per module, the
first one it meets. This module turns globs and layers into such names, replaces choices whose first tensor is not the
one meant, and splits what a graph cannot carry into several compile passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...store.errors import InputError
from ..selection import Selection

#: Extra outputs of a compiled graph by default. Each costs device memory and a transfer per step.
OUTPUT_BUDGET = 64
#: Without these arguments of a NeuronConfig an application keeps its captured tensors to itself.
ON_DEVICE_SAMPLING: dict[str, Any] = {
    "on_device_sampling_config": {"do_sample": False, "top_k": 1, "top_k_kernel_enabled": False},
    "output_logits": True,
}
#: Modules that compute nothing by themselves or are never called: capturing them yields a single zero.
_SILENT = re.compile(r"(^|\.)(rank_util|spmd_rank|kv_mgr|sampler)(\.|$)")
_CONTAINERS = frozenset({"ModuleList", "ModuleDict", "Sequential", "KVCacheManager", "SPMDRank", "Sampler"})
_LATER_ROTARY = re.compile(r"(^|\.)layers\.(?!0\.)\d+\..*rotary_emb$")


@dataclass(frozen=True)
class DevicePass:
    """One compilation.

    Attributes:
        modules: names for `modules_to_capture`, in order.
        inputs: capture module inputs as well.
    """

    modules: tuple[str, ...]
    inputs: bool

    @property
    def n_outputs(self) -> int:
        """Outputs that the graph gets on top of its own."""
        return len(self.modules) * (2 if self.inputs else 1)

    def slots(self) -> tuple[tuple[str, str], ...]:
        """Module and port of every captured tensor, in the order in which the application returns them."""
        ports = ("output", "input") if self.inputs else ("output",)
        return tuple((module, port) for module in self.modules for port in ports)

    def neuron_options(self) -> dict[str, Any]:
        """Arguments of the port's NeuronConfig at compile time.

        Captures are returned only by a graph that samples and returns its logits too.
        """
        return {
            "tensor_capture_config": {"modules_to_capture": list(self.modules), "capture_inputs": self.inputs},
            **ON_DEVICE_SAMPLING,
        }


@dataclass(frozen=True)
class DevicePlan:
    """All compilations of a capture.

    Attributes:
        passes: they differ in `modules`; `passes.record_passes` joins them into one run.
        notes: choices that were replaced, with the reason.
    """

    passes: tuple[DevicePass, ...]
    notes: tuple[str, ...]


def plan_device_capture(modules: Mapping[str, str], selection: Selection, *, budget: int = OUTPUT_BUDGET) -> DevicePlan:
    """Decide what to compile.

    Args:
        modules: class name by path, for every module of the port (`named_modules`).
        selection: the options of the capture; positions are applied when tensors are stored.
        budget: extra outputs that one graph carries.

    Raises:
        InputError: nothing is selected, or the budget holds not even one module.
    """
    per_module = 2 if selection.inputs else 1
    if budget < per_module:
        raise InputError(f"a budget of {budget} outputs carries no module; give at least {per_module}")
    chosen: dict[str, None] = {}
    notes: list[str] = []
    for path, kind in modules.items():
        if path == "" or not selection.keeps(path) or kind in _CONTAINERS or _SILENT.search(path):
            continue
        if _LATER_ROTARY.search(path):
            notes.append(f"{path}: left out, later layers reuse the rotary embedding of the first")
            continue
        for name in _working_sites(path, modules, notes):
            chosen.setdefault(name)
    if not chosen:
        raise InputError("no module is selected; look at --include, --exclude and --layers")
    names, size = list(chosen), budget // per_module
    passes = tuple(
        DevicePass(tuple(names[start : start + size]), selection.inputs) for start in range(0, len(names), size)
    )
    return DevicePlan(passes, tuple(notes))


def _working_sites(path: str, modules: Mapping[str, str], notes: list[str]) -> list[str]:
    """The names to capture in place of one whose first tensor is not its main output."""
    leaf = path.rpartition(".")[2]
    replaced: list[str] | None = None
    why = ""
    if leaf == "self_attn" or modules[path].endswith("Attention"):
        replaced, why = [f"{path}.o_proj"], "its first tensor in alphabetical order is the rotary cosine"
    elif leaf == "qkv_proj":
        parts = [f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj", "Wqkv")]
        replaced, why = parts, "of its three tensors only the queries are kept"
    elif leaf == "router":
        replaced, why = [f"{path}.linear_router"], "of its tensors only the logits are kept, flattened with padding"
    if replaced is None:
        if leaf == "rotary_emb":
            notes.append(f"{path}: only the cosine is kept")
        return [path]
    known = [name for name in replaced if name in modules]
    notes.append(f"{path}: replaced by {', '.join(known) or 'nothing'}, {why}")
    return known
