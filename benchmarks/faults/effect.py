"""What a planted bug really does, measured without the analysis: its effect in FP32 against BF16's own error.

A port runs in FP32 with and without the bug, and the baseline in BF16, on the same tokens. At every site

    effect = ||planted - reference|| / ||baseline - reference||,

so R is about sqrt(1 + effect^2): from an effect of 1 on, the bug is larger than the noise and counts as visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensorsleuth.capture.drive import run_prompts
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import HuggingFaceCausalModel
from tensorsleuth.capture.pending import PendingTensor
from tensorsleuth.capture.prompts import EncodedPrompt
from tensorsleuth.capture.recorder import Recorder
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store.index import TensorKey

from .fault import Fault

VISIBLE = 1.0
PHASES = ("prefill", "decode")
#: Effect at a site that the baseline computes without rounding: relative error in units of BF16's unit roundoff.
_ROUNDOFF = 2.0**-8

Place = tuple[str, str, str, str]
Observed = dict[Place, dict[tuple[int, int], npt.NDArray[np.float64]]]


class _Memory:
    """A sink that keeps floating-point values by place, and by prompt and first position."""

    def __init__(self) -> None:
        self.values: Observed = {}
        self.order: dict[Place, int] = {}

    def put(self, key: TensorKey, source: PendingTensor) -> None:
        with source.values() as values:
            if key.position_start is None or key.call or key.phase not in PHASES or values.dtype.kind in "iub":
                return
            place = (key.phase, key.module, key.port, key.slot)
            self.order.setdefault(place, key.exec_order)
            self.values.setdefault(place, {})[key.prompt or 0, key.position_start] = values.astype(np.float64)

    def flush(self) -> None:
        """Nothing waits."""


@dataclass(frozen=True)
class Observation:
    """Every floating-point tensor of a run, and the order in which places were seen within a phase."""

    values: Observed
    order: dict[Place, int]


def observe(model: Any, prompts: Sequence[EncodedPrompt], generation: Generation) -> Observation:
    """Run a model over prompts and keep inputs and outputs of all modules."""
    memory = _Memory()
    recorder = Recorder(model, memory, Selection(inputs=True))
    recorder.attach()
    try:
        with torch.no_grad(), recorder.guard:
            run_prompts(HuggingFaceCausalModel(model), prompts, generation, recorder.step, tokens=[])
    finally:
        recorder.detach()
    return Observation(memory.values, memory.order)


@dataclass(frozen=True)
class Effect:
    """Size of a planted bug at one site."""

    phase: str
    module: str
    port: str
    slot: str
    order: int
    size: float


def effects(reference: Observation, baseline: Observation, planted: Observation) -> list[Effect]:
    """The effect at every site that all three have, prefill before decode, in execution order."""
    found = []
    for place, expected in reference.values.items():
        narrow, wrong = baseline.values.get(place), planted.values.get(place)
        if narrow is None or wrong is None:
            continue
        size = _size(expected, narrow, wrong)
        if size is not None:
            found.append(Effect(*place, reference.order[place], size))
    return sorted(found, key=lambda effect: (PHASES.index(effect.phase), effect.order))


def _size(
    expected: dict[tuple[int, int], Any], narrow: dict[tuple[int, int], Any], wrong: dict[tuple[int, int], Any]
) -> float | None:
    norm = noise = change = 0.0
    for key, values in expected.items():
        if key not in narrow or key not in wrong or values.shape != wrong[key].shape:
            return None
        if float(np.abs(values).max(initial=0)) > 1e30:  # an additive mask
            return None
        if not np.isfinite(wrong[key]).all():
            return math.inf
        norm += float(np.square(values).sum())
        noise += float(np.square(narrow[key] - values).sum())
        change += float(np.square(wrong[key] - values).sum())
    if noise > 0:
        # What FP32 rounds away is not a change.
        return math.sqrt(change / noise)
    return 0.0 if change <= 1e-12 * norm else math.sqrt(change / norm) / _ROUNDOFF


@dataclass(frozen=True)
class Truth:
    """Where a planted bug shows first.

    Attributes:
        visible: its effect exceeds the noise at a site of its own.
        size: its effect at the first own site where it is visible, else the largest at any own site.
        phase: `prefill` or `decode`: where it is visible first.
        phases: those that may be named: this one, and an earlier one where it acts somewhat below the noise.
        origins: module paths that name its place, globs among them.
        largest: the largest effect at any site.
        early: effect before its own first site; something else than the bug differs when this is not 0.
    """

    visible: bool
    size: float
    phase: str
    phases: tuple[str, ...]
    origins: tuple[str, ...]
    largest: float
    early: float


def truth(fault: Fault, found: Iterable[Effect], *, inputs: bool = True) -> Truth:
    """What the analysis would have to say about a planted bug; without `inputs`, from outputs of modules alone."""
    sites = [effect for effect in found if inputs or effect.port == "output"]
    own = [effect for effect in sites if any(fnmatchcase(effect.module, pattern) for pattern in fault.own)]
    if not own:
        raise ValueError(f"no site matches {fault.own} of {fault.name}")
    largest = max(effect.size for effect in sites)
    shown = next((effect for effect in own if effect.size >= VISIBLE), None)
    # The noise of FP32 itself, at sites whose BF16 error is small, stays below a hundredth.
    start = next((effect for effect in own if effect.size > 0.01), own[0])
    early = max((e.size for e in sites if (PHASES.index(e.phase), e.order) < _place(start)), default=0.0)
    if shown is None:
        return Truth(False, max(effect.size for effect in own), "", (), (), largest, early)
    first = next(effect for effect in sites if effect.size >= VISIBLE)
    layer = _layer(shown.module)
    # Where the bug acts somewhat below the noise, naming the earlier place is right as well.
    acting = [effect for effect in own if effect.size >= 0.3 * VISIBLE and _place(effect) <= _place(shown)]
    wanted = {
        shown.module,
        first.module,
        *(effect.module for effect in acting),
        *(template.format(layer) for template in fault.accept),
    }
    phases = tuple(phase for phase in PHASES if any(effect.phase == phase for effect in acting))
    return Truth(True, shown.size, shown.phase, phases, tuple(sorted(wanted)), largest, early)


def _place(effect: Effect) -> tuple[int, int]:
    return PHASES.index(effect.phase), effect.order


def _layer(module: str) -> str:
    return next((part for part in module.split(".") if part.isdigit()), "")
