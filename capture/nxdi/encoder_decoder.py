"""Driving and recording ports of encoder-decoders, whose encoder and decoder are applications of their own.

On a CPU both are recorded as one model with the parts `encoder` and `decoder`; at prefill, both run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...store.errors import InputError
from ..generate import Source
from ..layout import StepLayout
from .adapter import NxdiCausalModel, with_rows
from .application import CpuSettings
from .recorder import NxdiRecorder


class BothStacks(torch.nn.Module):
    """The models of encoder and decoder under one root, whose forward is one pass of the application."""

    def __init__(self, application: Any) -> None:
        """Join the two models of an application that was built on a CPU."""
        super().__init__()
        self.encoder = application.encoder.models[0].model
        self.decoder = application.decoder.models[0].model

    def forward(self, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the application; its logits by the name that they have in transformers."""
        return {"logits": run()}


class EncoderDecoderRecorder(NxdiRecorder):
    """Records one rank's encoder and decoder; caches, which modules hand back beside their output, are left out."""

    def _record(self, path: str, port: str, call: int, value: Any) -> None:
        if port == "output" and isinstance(value, tuple):
            value = value[0]
        super()._record(path, port, call, value)


class NxdiEncoderDecoder(NxdiCausalModel):
    """Adapts an application of two stacks to `generate.CausalModel`; prompts are its decoder's tokens."""

    def __init__(self, application: Any, root: BothStacks, *, source_length: int, **options: Any) -> None:
        """Describe an application.

        Args:
            application: built on a CPU.
            root: its two models.
            source_length: tokens of the source that the encoder was built for.
            options: as `NxdiCausalModel` takes them.
        """
        super().__init__(application, **options)
        self._root, self._source_length = root, source_length

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """See `generate.CausalModel`; `cache` is the source at prefill.

        Raises:
            InputError: more prompts or longer ones than the application was built for.
        """
        rows = input_ids.shape[0]
        if rows > self._batch:
            raise InputError(f"{rows} prompts in one batch, the application was built for {self._batch}")
        ids = with_rows(input_ids, self._batch)
        if isinstance(cache, Source):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            given = [with_rows(value, self._batch) for value in (cache.ids, cache.mask)]
            self._check_lengths(input_ids.shape[1], given[0].shape[1])
            run = partial(self._application, *given, ids, with_rows(mask, self._batch))
            layout = self._padded(self._length)
        else:
            positions = with_rows(position_ids, self._batch)
            run = partial(self._application, decoder_input_ids=ids, position_ids=positions)
            layout = self._padded(1)
        with self._recorded(layout):
            logits: torch.Tensor = self._root(run)["logits"]
        return logits[:rows], True

    def _check_lengths(self, decoder: int, source: int) -> None:
        for length, limit, what in (
            (decoder, self._length, "decoder begins with"),
            (source, self._source_length, "source has"),
        ):
            if length > limit:
                raise InputError(f"the {what} {length} tokens, the application was built for {limit}")

    def _padded(self, length: int) -> StepLayout | None:
        layout = super()._padded(length)
        if layout is None or layout.source is None:
            return layout
        return replace(layout, source=replace(layout.source, batch=self._batch, length=self._source_length))


def drive_of(application: Any, model: torch.nn.Module, settings: CpuSettings, pad_token: int) -> NxdiCausalModel:
    """What drives an application on a CPU.

    Args:
        application: the application.
        model: its first model that is recorded.
        settings: that it was built with.
        pad_token: token id at padding.
    """
    options: dict[str, Any] = {
        "batch": settings.batch,
        "length": settings.length,
        "pad_token": pad_token,
        "one_by_one": settings.continuous_batching,
    }
    if isinstance(model, BothStacks):
        source_length = application.config.neuron_config.source_len
        return NxdiEncoderDecoder(application, model, source_length=source_length, **options)
    return NxdiCausalModel(application, **options)
