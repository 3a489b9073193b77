"""Driving an NxD Inference application over prompts: padding to the bucket, prefill, decode, reset.

The application pads inside; the layouts given to the recorders describe the padded tensors, so that rows hold real
tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from ...store.errors import InputError
from ..layout import Row, StepLayout

#: Position id of padding tokens at prefill.
_PAD_POSITION = 1


class StepRecorder(Protocol):
    """Whoever has to know the layout of every forward pass.

    Attributes:
        cache_rows: row of each prompt in the key-value cache.
    """

    cache_rows: dict[int, int]

    def step(self, layout: StepLayout) -> AbstractContextManager[None]:
        """Context around one forward pass."""


class NxdiCausalModel:
    """Adapts an application to `generate.CausalModel`."""

    def __init__(
        self,
        application: Any,
        *,
        batch: int,
        length: int,
        pad_token: int,
        one_by_one: bool,
        recorders: Sequence[StepRecorder] = (),
        options: dict[str, Any] | None = None,
    ) -> None:
        """Describe an application.

        Args:
            application: on a CPU or loaded onto a device.
            batch: rows it was built for.
            length: prefill bucket, at least as long as every prompt.
            pad_token: token id at padding.
            one_by_one: prefill prompts one after the other (continuous batching).
            recorders: recorders of its models.
            options: further arguments of its forward.
        """
        self._application, self._batch, self._length = application, batch, length
        self._pad_token, self._one_by_one = pad_token, one_by_one
        self.recorders: tuple[StepRecorder, ...] = tuple(recorders)
        self.options = options or {}
        self._layout: StepLayout | None = None

    @contextmanager
    def step(self, layout: StepLayout) -> Iterator[None]:
        """Announce the layout of the next forward pass, unpadded; see `generate.run_batch`."""
        self._layout = layout
        for recorder in self.recorders:
            recorder.cache_rows = {row.prompt: row.index for row in layout.rows}
        try:
            yield
        finally:
            self._layout = None

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """See `generate.CausalModel`; the cache lives in the application, `cache` only tells prefill from decode."""
        rows, real = input_ids.shape[0], input_ids.shape[1]
        if rows > self._batch:
            raise InputError(f"{rows} prompts in one batch, the application was built for {self._batch}")
        if cache is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            self._application.reset()
            return self._prefill(input_ids, mask, real), True
        ids, positions = with_rows(input_ids, self._batch), with_rows(position_ids, self._batch)
        with self._recorded(self._padded(1)):
            output = self._forward(ids, None, positions, torch.arange(self._batch))
        return output[:rows], True

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor, real: int) -> torch.Tensor:
        if real > self._length:
            raise InputError(f"a prompt of {real} tokens does not fit a prefill of {self._length}")
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, _PAD_POSITION)
        ids = ids.masked_fill(mask == 0, self._pad_token)
        n_rows = ids.shape[0]
        if not self._one_by_one:
            ids, mask, positions = (with_rows(value, self._batch) for value in (ids, mask, positions))
            with self._recorded(self._padded(self._length)):
                return self._forward(ids, mask, positions, torch.arange(self._batch))[:n_rows]
        logits = []
        for index in range(n_rows):
            one = slice(index, index + 1)
            with self._recorded(self._alone(index)):
                logits.append(self._forward(ids[one], mask[one], positions[one], torch.tensor([index])))
        return torch.cat(logits)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, sequences: torch.Tensor
    ) -> torch.Tensor:
        output = self._application(
            ids,
            attention_mask=mask,
            position_ids=positions,
            seq_ids=sequences,
            sampling_params=torch.ones(len(sequences), 3),
            **self.options,
        )
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _recorded(self, layout: StepLayout | None) -> Iterator[None]:
        with ExitStack() as stack:
            for recorder in self.recorders if layout is not None else ():
                assert layout is not None
                stack.enter_context(recorder.step(layout))
            yield

    def _padded(self, length: int) -> StepLayout | None:
        return None if self._layout is None else replace(self._layout, batch=self._batch, length=length)

    def _alone(self, index: int) -> StepLayout | None:
        if self._layout is None:
            return None
        rows: tuple[Row, ...] = tuple(replace(row, index=0) for row in self._layout.rows if row.index == index)
        return replace(self._layout, batch=1, length=self._length, rows=rows)


def with_rows(values: torch.Tensor, batch: int) -> torch.Tensor:
    """Fill a batch up by repeating its first row."""
    missing = batch - values.shape[0]
    return values if missing <= 0 else torch.cat([values, values[:1].expand(missing, -1)])
