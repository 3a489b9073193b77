"""A hook for NxD Inference's own tensor capture: captured tensors go straight into shards.

The library's hook writes files without tokens, positions, lengths, rank or tensor-parallel degree, and counts steps
over all prompts. This one is told the layout of every forward pass, so that what it stores is what any capture stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...store.errors import CaptureError, UnsupportedDtypeError
from ...store.index import TensorKey
from ...store.trace import site_name
from ..layout import StepLayout, cut
from ..pending import WriteGuard, check_storable
from ..recorder import TensorSink
from .device_plan import DevicePass

#: Dims of one tensor: module path, port, slot, tensor, layout.
DimsOf = Callable[[str, str, str, torch.Tensor, StepLayout], str]
#: Module under which tensors appear that model code registered by hand; the library drops their names.
MANUAL = "registered"


class CapturedTensorHook:
    """Pass it as `tensor_capture_hook`; announce every forward pass with `step`."""

    def __init__(
        self,
        slots: Sequence[tuple[str, str]],
        writer: TensorSink,
        dims_of: DimsOf,
        *,
        rank: int = 0,
        positions: range | None = None,
        first_order: int = 0,
        stored: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        """Prepare to store.

        Args:
            slots: module and port of every captured tensor, in order, see `DevicePass.slots`.
            writer: where tensors go.
            dims_of: their dims.
            rank: which rank's part the tensors are.
            positions: keep only these token positions.
            first_order: place in execution order of the first captured tensor.
            stored: modules and ports that an earlier compile pass of the run has stored.
        """
        self._first_order, self._stored = first_order, stored
        self._slots, self._writer, self._dims_of = tuple(slots), writer, dims_of
        self._rank, self._positions = rank, positions
        self._layout: StepLayout | None = None
        self._guard = WriteGuard()
        self.cache_rows: dict[int, int] = {}
        self.skipped: dict[str, str] = {}
        self.n_calls = 0

    @contextmanager
    def step(self, layout: StepLayout) -> Iterator[None]:
        """Say which prompts and positions the forward pass inside computes."""
        self._layout = layout
        before = self.n_calls
        try:
            yield
        finally:
            self._layout = None
        if self.n_calls == before:
            raise CaptureError(
                "the application returned no captured tensors; compile it with tensor_capture_config, "
                "on_device_sampling_config and output_logits"
            )

    def __call__(self, application: Any, captured: Sequence[torch.Tensor]) -> None:
        """Store the tensors of one forward pass; the library calls this.

        Raises:
            CaptureError: fewer tensors than modules, the model was compiled with another list.
        """
        self.n_calls += 1
        layout = self._layout
        if layout is None:
            return
        if len(captured) < len(self._slots):
            raise CaptureError(
                f"{len(captured)} captured tensors for {len(self._slots)} sites: the model was compiled with "
                "another list of modules"
            )
        for order, tensor in enumerate(captured):
            manual = order - len(self._slots)
            module, port = self._slots[order] if manual < 0 else (MANUAL, "output")
            slot = "" if manual < 0 else str(manual)
            if (module, port) in self._stored:
                continue
            if (reason := _placeholder(tensor, by_hand=manual >= 0)) is not None:
                if reason:
                    self.skipped[site_name(module, port, slot)] = reason
                continue
            self._store(self._first_order + order, module, port, slot, tensor, layout)

    def _store(self, order: int, module: str, port: str, slot: str, tensor: torch.Tensor, layout: StepLayout) -> None:
        try:
            check_storable(tensor)
        except UnsupportedDtypeError as error:
            self.skipped[site_name(module, port, slot)] = str(error)
            return
        dims = self._dims_of(module, port, slot, tensor, layout)
        last_only = module.rpartition(".")[2] == "lm_head"
        for part in cut(tensor, layout, last_only=last_only, positions=self._positions, dims=dims, part=self._rank):
            key = TensorKey(
                part.prompt,
                layout.phase,
                layout.step,
                0,
                order,
                module,
                port,
                slot,
                part.dims,
                part.position_start,
                part.position_count,
            )
            # The application reuses its output buffers: what waits for the disk is a copy.
            values = part.values.detach().clone()
            self._writer.put(key, self._guard.reference(values))
        self._guard.forget()


def _placeholder(tensor: torch.Tensor, *, by_hand: bool) -> str | None:
    """Why a tensor is not one: a reason to report, empty for an unused slot, None for a real tensor."""
    if tensor.dtype is not torch.bfloat16 or tuple(tensor.shape) != (1,):
        return None
    value = float(tensor)
    if by_hand:
        return "" if math.isnan(value) else None
    return "the module produced nothing: it was not called, or capture was off for this step" if value == 0 else None


@contextmanager
def library_capture(model: torch.nn.Module, plan: DevicePass) -> Iterator[None]:
    """Let a model on a CPU go through the library's own capture code, as a compiled graph does.

    The library never switches capture on for a CPU, and its registry forgets the list of modules after every forward
    pass; here the list is set again before each.
    """
    from neuronx_distributed.utils.tensor_capture import enable_tensor_capture
    from neuronx_distributed.utils.tensor_capture.registry import TensorRegistry
    from neuronx_distributed_inference.models.config import TensorCaptureConfig

    modules = list(plan.modules)
    config: Any = model.neuron_config
    config.tensor_capture_config = TensorCaptureConfig(modules_to_capture=modules, capture_inputs=plan.inputs)
    enable_tensor_capture(model, modules, None, plan.inputs)
    registry: Any = TensorRegistry.get_instance()
    hooks = list(registry.model_info.hooks)

    def arm(*_: Any) -> None:
        registry.configure(enabled=True, modules=modules, max_tensors=None, capture_inputs=plan.inputs)

    handle = model.register_forward_pre_hook(arm, prepend=True)
    try:
        yield
    finally:
        for hook in (handle, *hooks):
            hook.remove()
        registry.enabled = False
        config.tensor_capture_config = None
