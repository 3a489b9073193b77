"""The recorder of one rank: knows the dims of NxD Inference's modules, its caches and its taps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...store.index import TensorKey
from ..layout import Cut, StepLayout, cut
from ..recorder import Recorder, TensorSink
from ..selection import Selection
from .expert_taps import EXPERT_TAPS, expert_taps
from .site_dims import SiteDims
from .taps import attention_paths, attention_taps, cache_tensors


class NxdiRecorder(Recorder):
    """Records one rank's model."""

    def __init__(
        self,
        model: torch.nn.Module,
        writer: TensorSink | None,
        selection: Selection,
        *,
        rank: int,
        tp: int,
        cache_length: int,
        scores: bool = False,
    ) -> None:
        """Prepare to record.

        Args:
            model: the rank's model.
            writer: where tensors go.
            selection: which sites are kept.
            rank: rank of this process.
            tp: tensor-parallel degree.
            cache_length: positions in the key-value cache.
            scores: record attention scores and weights too.
        """
        super().__init__(model, writer, selection)
        self._dims = SiteDims(model, tp)
        self._rank, self._cache_length, self._scores = rank, cache_length, scores
        self._attentions = attention_paths(model)
        #: Row of each prompt in the key-value cache; whoever runs the model keeps it up to date.
        self.cache_rows: dict[int, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the context is open."""
        self.attach()
        try:
            with self.taps(), self.guard:
                yield
        finally:
            self.detach()

    @contextmanager
    def taps(self) -> Iterator[None]:
        """Record what no module takes or returns while the context is open."""
        with attention_taps(self.model, self._tap, scores=self._scores), expert_taps(self.model, self._tap):
            yield

    def _put(self, key: TensorKey, tensor: torch.Tensor) -> None:
        if key.phase == "static":
            key = replace(key, dims=self._dims.parameter(key.module, tensor))
        super()._put(key, tensor)

    def _tap(self, path: str, slot: str, tensor: torch.Tensor) -> None:
        if self.selection.keeps(path):
            self._record(path, "tap", 0, {slot: tensor})

    def _record(self, path: str, port: str, call: int, value: Any) -> None:
        if path == "" and port == "output":
            for layer, slot, tensor in cache_tensors(value, len(self._attentions)):
                self._tap(self._attentions[layer], slot, tensor)
            n_caches = 2 * len(self._attentions)
            value = value[: len(value) - n_caches] if isinstance(value, (list, tuple)) else value
        super()._record(path, port, call, value)

    def _cuts(self, path: str, port: str, slot: str, tensor: torch.Tensor, layout: StepLayout | None) -> Iterable[Cut]:
        if layout is None:
            return super()._cuts(path, port, slot, tensor, layout)
        positions = self.selection.positions
        if port == "tap":
            dims, layout = self._tap_dims(path, slot, tensor, layout)
            found = cut(tensor, layout, last_only=False, positions=positions, dims=dims)
            if slot in ("scores", "weights") and dims:
                slots = self._cache_slots(path, tensor.shape[3] - 1)
                return (_with_real_keys(part, layout, slots) for part in found)
            return found
        dims = self._dims(path, port, slot, tensor, layout)
        last_only = path == "" or path.rpartition(".")[2] == "lm_head"
        return cut(tensor, layout, last_only=last_only, positions=positions, dims=dims, part=self._rank)

    def _cache_slots(self, path: str, width: int) -> int:
        """Slots of a layer's cache that are in use: of a sliding window, all but one hold earlier tokens."""
        window = getattr(self.model.get_submodule(path), "sliding_window", None)
        return window - 1 if window and width < self._cache_length else width

    def _tap_dims(self, path: str, slot: str, tensor: torch.Tensor, layout: StepLayout) -> tuple[str, StepLayout]:
        shape = tuple(tensor.shape)
        if slot in EXPERT_TAPS:
            return (self._dims.of_choices(slot) if shape[0] == layout.batch * layout.length else ""), layout
        if slot in ("k_cache", "v_cache"):
            if len(shape) != 4 or shape[2] != self._cache_length:
                return "", layout
            rows = tuple(
                replace(row, start=row.position, index=self.cache_rows.get(row.prompt, row.index))
                for row in layout.rows
            )
            return f"b n{self._dims.kv(path)} s d", replace(layout, batch=shape[0], length=shape[2], rows=rows)
        if len(shape) != 4 or (shape[0], shape[2]) != (layout.batch, layout.length):
            return "", layout
        if slot in ("scores", "weights"):
            return f"b n{self._dims.heads()} s k", layout
        return f"b n{self._dims.heads() if slot == 'q_rope' else self._dims.kv(path)} s d", layout


def _with_real_keys(part: Cut, layout: StepLayout, slots: int) -> Cut:
    """Scores or weights of one prompt, keys in the order of positions and without padding.

    In decode, the keys are the slots of the cache, then the token of the step; position p lies in slot p modulo their
    number.
    """
    if part.position_start is None or part.position_count is None:
        return part
    row = next(row for row in layout.rows if row.prompt == part.prompt)
    if layout.phase != "decode":
        return replace(part, values=part.values[..., row.start : row.start + row.count])
    keys = [position % slots for position in range(max(row.position - slots, 0), row.position)]
    return replace(part, values=part.values[..., [*keys, part.values.shape[-1] - 1]])
