"""The recorder: forward hooks on every module of a model, for the duration of a `with` block."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from ..store.errors import InputError, SleuthError, StorageError, UnsupportedDtypeError
from ..store.index import TensorKey
from ..store.manifest import ROLES, Module, Prompt, PromptTokens, RunManifest, write_manifest
from ..store.run_writer import QUEUE_BYTES, SHARD_BYTES, RunWriter
from ..store.trace import Trace, site_name
from .layout import Cut, StepLayout, cut, cut_weights, holds_attention_weights, layout_of
from .pending import PendingTensor, WriteGuard, check_storable
from .provenance import environment, weights_fingerprint
from .selection import Selection
from .slots import tensor_slots
from .widening import computes_in

#: Parameters and buffers up to this size are kept with the run.
SMALL_PARAMETER_BYTES = 1 << 20


class TensorSink(Protocol):
    """Where recorded tensors go; `RunWriter` is one."""

    def put(self, key: TensorKey, source: PendingTensor) -> None:
        """Take one tensor."""

    def flush(self) -> None:
        """Return once everything taken is safe."""


class Recorder:
    """Records the tensors of one model while its hooks are attached; made by `record`."""

    def __init__(self, model: torch.nn.Module, writer: TensorSink | None, selection: Selection) -> None:
        """Prepare to record; `attach` starts it."""
        self.model = model
        self.selection = selection
        self.guard = WriteGuard()
        self.skipped: dict[str, str] = {}
        self.n_forwards = 0
        self._writer = writer
        self._layout: StepLayout | None = None
        self._handles: list[Any] = []
        self._calls: Counter[int] = Counter()
        self._entered: dict[int, list[int]] = {}
        self._order = 0
        self._first_order: dict[str, int] = {}

    @contextmanager
    def step(self, layout: StepLayout) -> Iterator[None]:
        """Say which prompts and positions the forward pass inside computes."""
        self._layout = layout
        try:
            yield
        finally:
            self._layout = None

    def flush(self) -> None:
        """Return once everything recorded so far survives the death of the process."""
        if self._writer is not None:
            self._writer.flush()

    def modules(self) -> tuple[Module, ...]:
        """The module tree with the execution order seen so far."""
        return tuple(
            Module(
                path,
                type(module).__name__,
                path.rpartition(".")[0] if path else None,
                path.count(".") + 1 if path else 0,
                self._first_order.get(path, -1),
                sum(parameter.numel() for parameter in module.parameters(recurse=False)),
            )
            for path, module in self.model.named_modules()
        )

    def attach(self) -> None:
        """Register hooks on the root and on every selected module."""
        for path, module in self.model.named_modules():
            if path == "":
                self._handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
            if self.selection.keeps(path):
                self._handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave(path)))

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.guard.forget()

    def record_parameters(self) -> None:
        """Keep small parameters and buffers of selected modules with the run, as phase `static`."""
        for path, module in self.model.named_modules():
            if not self.selection.keeps(path):
                continue
            for port, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.numel() * tensor.element_size() <= SMALL_PARAMETER_BYTES:
                        key = TensorKey(None, "static", 0, 0, 0, path, port, name, "")
                        self._put(key, tensor)

    def _begin(self, module: torch.nn.Module, args: Any) -> None:
        self._calls.clear()
        self._entered.clear()
        self._order = 0
        self.n_forwards += 1
        self.guard.forget()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._calls[id(module)]
            self._calls[id(module)] += 1
            self._entered.setdefault(id(module), []).append(call)
            if self.selection.inputs:
                self._record(path, "input", call, (*args,) if len(args) != 1 or kwargs else args[0])
                if kwargs:
                    self._record(path, "input", call, kwargs)

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = self._entered[id(module)].pop()
            self._first_order.setdefault(path, self._order)
            self._record(path, "output", call, output)

        return hook

    def _record(self, path: str, port: str, call: int, value: Any) -> None:
        order = self._order
        self._order += 1
        for slot, tensor in tensor_slots(value):
            layout = layout_of(tensor.shape, self._layout)
            phase, step = (layout.phase, layout.step) if layout else ("forward", max(self.n_forwards - 1, 0))
            for part in self._cuts(path, port, slot, tensor, layout):
                prompt = 0 if layout is None else part.prompt
                start, count = part.position_start, part.position_count
                key = TensorKey(prompt, phase, step, call, order, path, port, slot, part.dims, start, count)
                self._put(key, part.values)

    def _cuts(self, path: str, port: str, slot: str, tensor: torch.Tensor, layout: StepLayout | None) -> Iterable[Cut]:
        """One prompt's part after the other of a captured tensor."""
        if layout is not None and holds_attention_weights(path, port, slot, tensor.shape, layout):
            return cut_weights(tensor, layout, positions=self.selection.positions)
        last_only = path == "" or path.rpartition(".")[2] == "lm_head"
        return cut(tensor, layout, last_only=last_only, positions=self.selection.positions)

    def _put(self, key: TensorKey, tensor: torch.Tensor) -> None:
        try:
            check_storable(tensor)
        except UnsupportedDtypeError as error:
            self.skipped[site_name(key.module, key.port, key.slot)] = str(error)
            return
        if self._writer is not None:
            self._writer.put(key, self.guard.reference(tensor))


@contextmanager
def record(
    trace: Trace,
    model: torch.nn.Module,
    *,
    run: str,
    role: str,
    selection: Selection | None = None,
    stack: str = "torch",
    model_name: str = "",
    prompts: Sequence[Prompt] = (),
    tokens: Callable[[], Sequence[PromptTokens]] = tuple,
    provenance: dict[str, Any] | None = None,
    statistics_only: bool = False,
    rank: int = 0,
    shard_bytes: int = SHARD_BYTES,
    queue_bytes: int = QUEUE_BYTES,
    recorder_type: Callable[[torch.nn.Module, TensorSink | None, Selection], Recorder] = Recorder,
) -> Iterator[Recorder]:
    """Record every forward pass of a model inside the `with` block as one run of a trace.

    When the block ends, the run is sealed and entered into the catalog; when it ends by an exception, what was
    recorded so far is kept and the run is marked `failed`.

    Args:
        trace: the trace that receives the run.
        model: any module tree; its forward may be called any number of times.
        run: name of the new run.
        role: `reference`, `baseline` or `target`.
        selection: which sites to keep; all module outputs by default.
        stack: what ran the model, for example `hf`.
        model_name: what the user calls the model; its class name by default.
        prompts: the prompts that layouts refer to.
        tokens: called at the end for the tokens at every position.
        provenance: more facts to keep; the caller may go on filling the mapping until the block ends.
        statistics_only: keep statistics and checksums, not values.
        rank: rank of this process.
        shard_bytes: size limit of a shard.
        queue_bytes: how many bytes may wait for the disk before the forward pass is held up.
        recorder_type: makes the recorder, for one that does more than record.

    Yields:
        The recorder; `recorder.step(layout)` names the prompts and positions of a forward pass.

    Raises:
        InputError: the role is unknown.
        RunExistsError: the run name is taken.
        StorageError: values could not be written.
    """
    if role not in ROLES:
        raise InputError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
    facts = {} if provenance is None else provenance
    facts.update(environment())
    parameters, wide = list(model.parameters()), computes_in(model)
    manifest = trace.begin_run(
        RunManifest(
            ordinal=0,
            run=run,
            role=role,
            stack=stack,
            model=model_name or type(model).__name__,
            dtype=_dominant_dtype(parameters) if wide is None else str(wide).removeprefix("torch."),
            device=str(parameters[0].device) if parameters else "cpu",
            tp=1,
            status="running",
            created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
            provenance=facts,
            prompts=tuple(prompts),
        )
    )
    recorder: Recorder

    status = "running"

    def current() -> RunManifest:
        # The writer thread calls this too, while the caller goes on filling the facts: they are copied at once.
        return dataclasses.replace(
            manifest, status=status, provenance=dict(facts), tokens=tuple(tokens()), modules=recorder.modules()
        )

    writer = RunWriter(
        trace.run_folder(run),
        run,
        rank=rank,
        statistics_only=statistics_only,
        manifest=lambda: current().to_json(),
        shard_bytes=shard_bytes,
        queue_bytes=queue_bytes,
        take_turns=_n_cores() <= torch.get_num_threads(),
    )
    recorder = recorder_type(model, writer, selection or Selection())
    try:
        facts["weights_fingerprint"] = weights_fingerprint(model)
        facts["statistics_only"] = statistics_only
        recorder.record_parameters()
        recorder.attach()
        with recorder.guard:
            yield recorder
        status = "complete"
    finally:
        status = "failed" if status == "running" else status
        recorder.detach()
        _finish(trace, writer, recorder, facts, current)


def _finish(
    trace: Trace, writer: RunWriter, recorder: Recorder, facts: dict[str, Any], manifest: Callable[[], RunManifest]
) -> None:
    """Seal the shards, note what was skipped, and enter the run into the catalog."""
    facts["skipped"] = recorder.skipped
    facts["snapshots"] = recorder.guard.n_snapshots
    try:
        writer.close()
    except SleuthError:
        failed = dataclasses.replace(manifest(), status="running")
        _write_if_possible(trace, failed)
        raise
    totals = writer.totals
    facts["captured"] = dataclasses.asdict(totals)
    trace.finish_run(manifest())


def _write_if_possible(trace: Trace, manifest: RunManifest) -> None:
    """Keep the manifest of a run whose shards await `repair`; a full disk must not hide the first error."""
    with suppress(StorageError):
        write_manifest(trace.run_folder(manifest.run), manifest)


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dominant_dtype(parameters: Sequence[torch.nn.Parameter]) -> str:
    sizes: Counter[str] = Counter()
    for parameter in parameters:
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else "none"
