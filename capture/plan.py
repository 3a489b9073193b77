"""Predicting a capture before it runs: tensors, bytes and seconds, from a model without weights.

The model is built and run on fake tensors, which have shapes but no values. The same hooks count what a recorder
would store. Time is predicted from the floating-point operations counted on the way, a small matrix product timed in
the run's dtype, and a short write to the trace's disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils.flop_counter import FlopCounterMode

from ..store.index import TensorKey
from .generate import CausalModel, Generation, padded, positions_of
from .layout import StepLayout, layout_from_mask
from .prompts import EncodedPrompt
from .recorder import Recorder
from .selection import Selection

_PROBE_BYTES = 32 << 20
_PROBE_SIZE = 768
#: Hook, queue, index row and HDF5 metadata of one tensor, in seconds (measured on one core of a server).
_SECONDS_PER_TENSOR = 1.2e-4


@dataclass(frozen=True)
class Plan:
    """What a capture will take.

    Attributes:
        n_tensors: rows in the index, without attention masks among recorded inputs (they depend on values).
        nbytes: size of all values.
        stored_nbytes: the same with repeated views counted once; equal contents may save more.
        flops: floating-point operations of all forward passes.
        seconds: predicted wall time of forward passes and storage, without loading the model.
    """

    n_tensors: int
    nbytes: int
    stored_nbytes: int
    flops: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


class CountingRecorder(Recorder):
    """A recorder that counts instead of storing; repeated views are recognised by identity."""

    n_tensors = nbytes = stored_nbytes = 0

    def __init__(self, model: torch.nn.Module, selection: Selection) -> None:
        """Prepare to count; `selection`: which sites are kept."""
        super().__init__(model, None, selection)
        self._seen: dict[int, torch.Tensor] = {}

    def _put(self, key: TensorKey, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.n_tensors += 1
        self.nbytes += size
        if self._seen.setdefault(id(tensor), tensor) is tensor:
            self.stored_nbytes += size

    def counts(self) -> tuple[int, int, int]:
        """Tensors, bytes and bytes to store so far; views of the forward pass are forgotten."""
        self._seen.clear()
        return self.n_tensors, self.nbytes, self.stored_nbytes


def plan_capture(
    build: Callable[[], tuple[torch.nn.Module, CausalModel]],
    prompts: Sequence[EncodedPrompt],
    generation: Generation,
    selection: Selection,
    *,
    folder: Path,
    dtype: torch.dtype,
    statistics_only: bool = False,
    counting: Callable[[torch.nn.Module, Selection], CountingRecorder] = CountingRecorder,
) -> Plan:
    """Predict a capture.

    Args:
        build: makes the model and its adapter; called under fake tensors, so no weights are allocated.
        prompts: what it will run on.
        generation: how prompts are continued.
        selection: which sites are kept.
        folder: an existing folder on the disk the trace will be on.
        dtype: the model's dtype.
        statistics_only: values are not stored.
        counting: makes the recorder that counts, for models with sites of their own.

    Raises:
        RuntimeError: the model's forward depends on values and cannot run without them.
    """
    batches = Counter(
        tuple((len(prompt.token_ids), _n_forwards(prompt, generation)) for prompt in batch)
        for _, batch in generation.batches(prompts)
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        model, adapter = build()
        counter = counting(model, selection)
        counter.record_parameters()
        total = [*counter.counts(), 0]
        counter.attach()
        for lengths, times in batches.items():
            for passes, cost in _passes(mode, adapter, counter, lengths, generation):
                total = [have + times * passes * more for have, more in zip(total, cost, strict=True)]
        counter.detach()
    n_tensors, nbytes, stored, flops = total
    stored = 0 if statistics_only else stored
    seconds = flops * _seconds_per_flop(dtype) + stored * _seconds_per_byte(folder) + n_tensors * _SECONDS_PER_TENSOR
    return Plan(n_tensors, nbytes, stored, flops, seconds)


def _n_forwards(prompt: EncodedPrompt, generation: Generation) -> int:
    return max(len(prompt.forced) if prompt.forced is not None else generation.new_tokens, 1)


def _passes(
    mode: FakeTensorMode,
    model: CausalModel,
    counter: CountingRecorder,
    lengths: Sequence[tuple[int, int]],
    generation: Generation,
) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Yield `(how often, cost)` of the prefill of one batch and of its decode steps, alive rows counted."""
    batch = [EncodedPrompt("", None, (0,) * length) for length, _ in lengths]
    with no_dispatch():
        ids, mask = padded(batch, generation)
        layout = layout_from_mask(mask, ids.shape[1], phase="prefill", step=0, prompts=range(len(batch)))
    cost, cache = _forward(mode, model, counter, ids, mask, None, layout)
    yield 1, cost
    ends = sorted({forwards for _, forwards in lengths if forwards > 1})
    if counter.selection.positions is not None:  # each step computes another position
        ends = list(range(2, max(ends, default=1) + 1))
    done = 1
    for end in ends:
        with no_dispatch():
            alive = torch.tensor([[int(forwards > done)] for _, forwards in lengths])
            mask = torch.cat([mask, alive], dim=1)
            layout = layout_from_mask(mask, 1, phase="decode", step=done, prompts=range(len(batch)))
            ids = torch.zeros_like(alive)
        cost, cache = _forward(mode, model, counter, ids, mask, cache, layout)
        yield end - done, cost
        done = end


def _forward(
    mode: FakeTensorMode,
    model: CausalModel,
    counter: CountingRecorder,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    layout: StepLayout,
) -> tuple[tuple[int, int, int, int], Any]:
    with no_dispatch():
        positions = positions_of(mask, ids.shape[1])
    before = counter.counts()
    with FlopCounterMode(display=False) as flops, counter.step(layout):
        # Shapes do not depend on the mask, and without it a model takes no decision by its values.
        _, cache = model(mode.from_tensor(ids), None, mode.from_tensor(positions), cache)
    after = counter.counts()
    n_tensors, nbytes, stored = (now - then for now, then in zip(after, before, strict=True))
    return (n_tensors, nbytes, stored, flops.get_total_flops()), cache


def _seconds_per_flop(dtype: torch.dtype) -> float:
    """Time a matrix product in the run's dtype."""
    matrix = torch.randn(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.float32).to(dtype)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(3):
        matrix @ matrix
    return (time.perf_counter() - start) / (3 * 2 * _PROBE_SIZE**3)


def _seconds_per_byte(folder: Path) -> float:
    """Time a write of a few megabytes to the trace's disk, including its way to the device."""
    data = memoryview(bytearray(_PROBE_BYTES))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - start) / _PROBE_BYTES
