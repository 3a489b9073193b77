"""Dims of the tensors that NxD Inference modules take and return.

Every rank holds its own part of a sharded tensor; dims say how the parts form the whole. What a module's class says
(column parallel, row parallel, grouped-query projections) decides; a tensor of any other module is taken as held by
every rank in full, which the comparison of ranks checks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..layout import StepLayout, infer_dims
from .expert_taps import CHOSEN, SUMMED

_EXPERTS = re.compile(r"(^|\.)expert_mlps(_\w+)?(\.|$)")
_ROUTER = re.compile(r"(^|\.)router$")
#: Attributes under which a grouped-query projection keeps the number of KV heads of the checkpoint.
_SOURCE_HEADS = "_src_num_key_value_heads"


@dataclass(frozen=True)
class _Rule:
    """What the class of a module says of its tensors: annotations of the last axis, by port."""

    output: str = ""
    input: str = ""


class SiteDims:
    """Dims of every site of one rank's model."""

    def __init__(self, model: torch.nn.Module, tp: int) -> None:
        """Look at the classes of all modules."""
        self._tp = tp
        self._rules: dict[str, _Rule] = {}
        self._qkv: dict[str, str] = {}
        self._heads: set[str] = set()
        modules = dict(model.named_modules())
        for path, module in modules.items():
            self._rules[path] = _rule_of(module) if tp > 1 else _Rule()
            if "GroupQueryAttention_QKV" in _classes(module):
                self._qkv[path] = self._kv_sharding(module)
        for path in modules:
            parent, _, leaf = path.rpartition(".")
            if leaf in ("act_fn", "activation") and self._has_sharded_output(parent, modules):
                self._rules[path] = _Rule("[tp]", "[tp]")
            if leaf in ("q_layernorm", "k_layernorm"):
                self._heads.add(path)

    def _has_sharded_output(self, parent: str, modules: Collection[str]) -> bool:
        """Whether a projection beside an activation leaves every rank its own part, which the activation then takes."""
        beside = (path for path in modules if path.rpartition(".")[0] == parent)
        return any(self._rules.get(path, _Rule()).output == "[tp]" for path in beside)

    def parameter(self, path: str, tensor: torch.Tensor) -> str:
        """Dims of a parameter or buffer; empty for one that every rank holds in full."""
        if self._tp == 1 or not getattr(tensor, "tensor_model_parallel", False) or tensor.ndim == 0:
            return ""
        axes = [f"p{index}" for index in range(tensor.ndim)]
        kv = path.rpartition(".")[2] in ("k_proj", "v_proj")
        axes[int(getattr(tensor, "partition_dim", 0))] += self.kv(path) if kv else "[tp]"
        return " ".join(axes)

    def kv(self, path: str) -> str:
        """Annotation of the axis of KV heads in the attention at or around `path`."""
        near = [qkv for qkv in self._qkv if qkv.startswith(f"{path}.") or path.startswith(qkv.rpartition(".")[0])]
        return self._qkv[near[0]] if near else next(iter(self._qkv.values()), "[tp]" if self._tp > 1 else "")

    def heads(self) -> str:
        """Annotation of the axis of query heads."""
        return "[tp]" if self._tp > 1 else ""

    def of_choices(self, slot: str) -> str:
        """Dims of a tap of experts, token by token and choice by choice."""
        if slot == CHOSEN:
            return "(b s) k"
        return "(b s) k h" + ("" if self._tp == 1 else "{tp:sum}" if slot == SUMMED else "[tp]")

    def __call__(self, path: str, port: str, slot: str, tensor: torch.Tensor, layout: StepLayout) -> str:
        """Dims of one tensor as it was seen, before it is split by prompt; empty when its axes are unknown."""
        shape, leaf = tensor.shape, path.rpartition(".")[2]
        last_only = path == "" or leaf == "lm_head"
        if path in self._heads and len(shape) == 4 and tuple(shape[:2]) == (layout.batch, layout.length):
            return f"b s n{self.heads() if leaf == 'q_layernorm' else self.kv(path)} d"
        if _EXPERTS.search(path) and (
            found := _of_experts(tuple(shape), layout, leaf, summed=self._tp > 1 and port == "output")
        ):
            return found
        if self._holds_part_of_positions(tuple(shape), layout):
            return "b s[tp] h"
        if len(shape) == 4:  # heads lead; with one head and one token, guessing from lengths would go wrong
            heads_lead = (shape[0], shape[2]) == (layout.batch, layout.length) and "mask" not in slot
            return f"b n{self.kv(path)} s d" if heads_lead else ""
        found = infer_dims(shape, layout.batch, layout.length, last_only=last_only)
        if last_only and found == "b s h":
            found = "b s v" if port == "output" else found
        if _ROUTER.search(path) and slot == "2" and found == "(b s) e":
            return "(b s) k"
        return self._annotated(found, path, port, slot)

    def _annotated(self, dims: str, path: str, port: str, slot: str) -> str:
        if self._tp == 1 or dims not in ("b s h", "b s v"):
            return dims
        parent, _, leaf = path.rpartition(".")
        if port == "output" and path in self._qkv and slot in ("1", "2"):
            return dims + self._qkv[path]
        if port == "output" and parent in self._qkv and leaf in ("k_proj", "v_proj"):
            return dims + self._qkv[parent]
        rule = self._rules.get(path, _Rule())
        if port == "output" and path in self._qkv and slot != "0":
            return dims
        return dims + (rule.output if port == "output" else rule.input)

    def _holds_part_of_positions(self, shape: tuple[int, ...], layout: StepLayout) -> bool:
        part = layout.length // self._tp
        return self._tp > 1 and part > 1 and len(shape) == 3 and shape[:2] == (layout.batch, part)

    def _kv_sharding(self, module: torch.nn.Module) -> str:
        if self._tp == 1:
            return ""
        source = getattr(module, _SOURCE_HEADS, None)
        now = getattr(module, "num_key_value_heads", None)
        if isinstance(source, int) and isinstance(now, int) and now == self._tp > source and now % source == 0:
            return f"[tp/{now // source}]"
        return "[tp]"


def _classes(module: torch.nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _rule_of(module: torch.nn.Module) -> _Rule:
    names = _classes(module)
    if names & {"ColumnParallelLinear", "QuantizedColumnParallel"}:
        return _Rule(output="" if getattr(module, "gather_output", False) else "[tp]")
    if names & {"RowParallelLinear", "QuantizedRowParallel"}:
        partial = "" if getattr(module, "reduce_output", True) else "{tp:sum}"
        return _Rule(output=partial, input="[tp]" if getattr(module, "input_is_parallel", True) else "")
    if "GroupQueryAttention_QKV" in names:
        return _Rule(output="[tp]")
    if "GroupQueryAttention_O" in names:
        return _Rule(input="[tp]")
    return _Rule()


def _of_experts(shape: tuple[int, ...], layout: StepLayout, leaf: str, *, summed: bool) -> str:
    """Experts see flattened tokens; with tensor parallelism each rank holds a summand of their output."""
    tokens = layout.batch * layout.length
    partial = "{tp:sum}" if summed else ""
    if len(shape) == 3 and shape[1] == tokens:
        return f"e (b s) h{partial}"
    if len(shape) == 2 and shape[0] == tokens and leaf.startswith("expert_mlps"):
        return f"(b s) h{partial}"
    return ""
