"""The replaying recorder: every module runs on given inputs, and what follows it on its given outputs.

One forward pass replays all modules. Before a module runs, the values that the other run gave its counterpart take the
place of its arguments; after it has run, the counterpart's outputs take the place of its own. So each module computes
on the other run's values whatever went wrong before it, and the code between modules (a residual sum, attention over
projections) computes on them too. A module with children runs twice: once undisturbed, which is what is recorded, and
once with its children replaying.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...analyze.sites import Site
from ...store.index import TensorKey
from ..layout import Cut, StepLayout
from ..recorder import Recorder, TensorSink
from ..selection import Selection
from ..slots import tensor_slots, with_tensors
from .origins import Origin, OriginTracker
from .random_inputs import RANDOM
from .values import Given, ValueSource

#: Arguments that say which tokens and positions are computed, not what they hold.
_BOOKKEEPING = re.compile(r"(^|[._])(input_ids|position_ids|cache_position|\w*mask\w*)($|\.)")
#: Arguments of modules whose output at a position depends on other positions.
_MIXING = ("attention_mask", "position_embeddings", "past_key_value", "past_key_values", "cache_params", "layer_past")
_LISTED = 3


@dataclass(frozen=True)
class Inputs:
    """What a module was replayed on.

    Attributes:
        captured: sites of the other run whose values were its arguments as they were captured.
        computed: its other arguments.
        trouble: why the module cannot be judged on its own, empty when it can.
    """

    captured: tuple[str, ...]
    computed: Origin
    trouble: str = ""

    @property
    def text(self) -> str:
        """In words."""
        parts = []
        if self.captured:
            parts.append(RANDOM if RANDOM in self.captured else "captured")
        sites = _listed(self.computed.sites)
        if self.computed.code:
            parts.append(f"computed by {_listed(self.computed.code)} from {sites or 'nothing captured'}")
        elif sites:
            parts.append(sites)
        if self.computed.through:
            parts.append(f"through the reference's {_listed(self.computed.through)}")
        return "; ".join(parts) or "tokens and positions"


@dataclass
class Replaying:
    """What one replay knows and finds out.

    Attributes:
        source: the values to put in place.
        wanted: sites of the reference to record.
        inputs: what each module was replayed on, by path; troubled where any call was.
    """

    source: ValueSource
    wanted: Collection[Site]
    inputs: dict[str, Inputs] = field(default_factory=dict)


class ReplayRecorder(Recorder):
    """Replays a model's modules while it records them."""

    def __init__(
        self, model: torch.nn.Module, writer: TensorSink | None, selection: Selection, *, replaying: Replaying
    ) -> None:
        """Prepare to replay; `attach` starts it."""
        super().__init__(model, writer, selection)
        self._replaying = replaying
        self._modules = {site.module for site in replaying.wanted}
        self._tracker = OriginTracker()
        self._pass: StepLayout | None = None
        self._steps: Sequence[StepLayout] = ()
        self._own: dict[tuple[int, int], Any] = {}

    @contextmanager
    def replay(self, layout: StepLayout, steps: Sequence[StepLayout]) -> Iterator[None]:
        """Replay the forward pass inside.

        Args:
            layout: its layout.
            steps: how to record it: layouts of the same pass whose rows are the steps of the other run.
        """
        self._pass, self._steps = layout, steps
        self._tracker.running.clear()
        try:
            with self._tracker:
                yield
        finally:
            self._pass = None

    def attach(self) -> None:
        """Register hooks on every module."""
        for path, module in self.model.named_modules():
            if path == "":
                self._handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
            self._handles.append(module.register_forward_pre_hook(self._arrive(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._depart(path)))

    def _begin(self, module: torch.nn.Module, args: Any) -> None:
        if not self._tracker.paused:
            super()._begin(module, args)

    def _arrive(self, path: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._tracker.paused or self._pass is None:
                return None
            call = self._calls[id(module)]
            self._calls[id(module)] += 1
            self._entered.setdefault(id(module), []).append(call)
            captured, args, kwargs = self._with_inputs(path, call, args, kwargs, self._pass)
            if path in self._modules:
                inputs = self._judge(path, module, captured, args, kwargs)
                if not inputs.trouble and _is_container(module):
                    self._own[id(module), call] = self._undisturbed(module, args, kwargs)
            self._tracker.running.append(path)
            return args, kwargs

        return hook

    def _depart(self, path: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._tracker.paused or self._pass is None:
                return None
            call = self._entered[id(module)].pop()
            self._tracker.running.pop()
            self._first_order.setdefault(path, self._order)
            if path in self._modules and not self._replaying.inputs[path].trouble:
                own = self._own.pop((id(module), call)) if _is_container(module) else output
                self._record_steps(path, call, own)
            return self._with_outputs(path, call, module, output, self._pass)

        return hook

    def _undisturbed(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._tracker.paused = True
        try:
            return module.forward(*args, **kwargs)
        finally:
            self._tracker.paused = False

    def _with_inputs(
        self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any], layout: StepLayout
    ) -> tuple[list[str], tuple[Any, ...], dict[str, Any]]:
        """The sites that arguments were replaced by, and the arguments."""
        value: Any = (*args,) if len(args) != 1 or kwargs else args[0]
        given: dict[str, Given] = {}
        main = True
        for slot, tensor in (*tensor_slots(value), *tensor_slots(kwargs)):
            if _BOOKKEEPING.search(slot):
                continue
            site = Site(path, "input", slot, call)
            if found := self._replaying.source.input(site, tensor, layout, main=main):
                given[slot] = found
                origin = Origin(frozenset({found.site}), complete=found.complete)
                self._tracker.mark(found.values, origin)
            main = main and not tensor.is_floating_point()
        tensors = {slot: found.values for slot, found in given.items()}
        if not tensors:
            return [], args, kwargs
        value = with_tensors(value, tensors)
        args = value if len(args) != 1 or kwargs else (value,)
        return [found.site for found in given.values()], args, with_tensors(kwargs, tensors)

    def _with_outputs(self, path: str, call: int, module: torch.nn.Module, output: Any, layout: StepLayout) -> Any:
        """The output with the other run's values in place of its own, where it has them."""
        given: dict[str, torch.Tensor] = {}
        for slot, tensor in tensor_slots(output):
            found = self._replaying.source.output(Site(path, "output", slot, call), tensor, layout)
            if found is not None:
                given[slot] = found.values
                self._tracker.mark(found.values, Origin(frozenset({found.site}), complete=found.complete))
            elif not _is_container(module) and _computes(module):
                self._tracker.mark(tensor, _passed(path, module, self._tracker.of(tensor)))
        return with_tensors(output, given) if given else output

    def _judge(
        self, path: str, module: torch.nn.Module, captured: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Inputs:
        """Note what a module is replayed on, and whether that is the other run's."""
        tensors = [tensor for slot, tensor in tensor_slots((args, kwargs)) if not _BOOKKEEPING.search(slot)]
        origins = [origin for tensor in tensors if (origin := self._tracker.of(tensor)) is not None]
        known = frozenset(captured)
        computed = Origin.union(origin for origin in origins if not origin.sites or origin.sites - known)
        trouble = _trouble(path, module, Origin.union(origins), mixes=any(name in kwargs for name in _MIXING))
        inputs = Inputs(tuple(captured), computed, trouble)
        before = self._replaying.inputs.get(path)
        if before is None or (inputs.trouble and not before.trouble):
            self._replaying.inputs[path] = inputs
        return self._replaying.inputs[path] if before and before.trouble else inputs

    def _record_steps(self, path: str, call: int, output: Any) -> None:
        order = self._order
        for step in self._steps:
            self._order = order
            with self.step(step):
                self._record(path, "output", call, output)

    def _cuts(self, path: str, port: str, slot: str, tensor: torch.Tensor, layout: StepLayout | None) -> Iterable[Cut]:
        """Only what has positions: anything else depends on how positions were divided into steps."""
        return (part for part in super()._cuts(path, port, slot, tensor, layout) if part.position_start is not None)

    def _put(self, key: TensorKey, tensor: torch.Tensor) -> None:
        if key.port != "output" or Site(key.module, key.port, key.slot, key.call) in self._replaying.wanted:
            super()._put(key, tensor)


def _passed(path: str, module: torch.nn.Module, origin: Origin | None) -> Origin:
    """Origin of the output of a module for which the other run has no values.

    One without weights that sees positions only (a rotary embedding) is the reference's code, as a mask is.
    """
    if origin is None and next(module.parameters(), None) is None:
        return Origin(code=frozenset({path}))
    own = origin or Origin()
    return Origin(own.sites, own.code - {path}, own.through | {path}, own.complete)


def _is_container(module: torch.nn.Module) -> bool:
    return next(module.children(), None) is not None


def _computes(module: torch.nn.Module) -> bool:
    """Whether a module without children can make a difference (dropout and identity cannot, in evaluation)."""
    return not isinstance(module, (torch.nn.Identity, torch.nn.Dropout))


def _trouble(path: str, module: torch.nn.Module, origin: Origin, *, mixes: bool) -> str:
    """Why a module's own share cannot be told from that of others, or empty."""
    if not origin.sites and not origin.through and _is_container(module):
        return "its input is tokens: replaying it would be the reference run itself"
    parent = path.rpartition(".")[0]
    foreign = sorted(other for other in origin.through if not other.startswith(f"{parent}."))
    if foreign:
        return f"its input passes through {_listed(foreign)}, of which the target recorded no output"
    if not origin.complete and (mixes or origin.code):
        return "the target recorded its input at only some positions"
    return ""


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(name or "(root)" for name in names)
    rest = len(ordered) - _LISTED
    return ", ".join(ordered[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
