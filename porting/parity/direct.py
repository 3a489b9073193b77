"""The shortest parity check: one process, one rank, FP32, logits of prefill and decode; nothing is recorded.

The gate says where a port diverges; this says in a second or two whether it does.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...capture.generate import Source
from ...capture.hf import ModelSource, is_encoder_decoder, load_model
from ...capture.hf_encoder_decoder import adapter_of
from ...capture.nxdi.application import CpuSettings, build_application, build_config
from ...capture.nxdi.encoder_decoder import drive_of
from ...capture.nxdi.port import activate, load_class, parse_class
from ...capture.nxdi.rank_process import join_alone
from ...capture.nxdi.taking import distinct_models
from ..spec.architecture import Architecture
from ..spec.encoder_decoder_facts import AnyArchitecture
from ..spec.hostile import tokens_for
from .hostile_checkpoint import save_checkpoint

_LENGTH = 64


@dataclass(frozen=True)
class LogitErrors:
    """Relative L2 distance of the logits from the reference's."""

    prefill: float
    decode: float

    @property
    def worst(self) -> float:
        """The larger one."""
        return max(self.prefill, self.decode)


@torch.no_grad()
def logit_errors(
    model: Any, port: str, architecture: AnyArchitecture | None = None, *, prompt: int = 11, decoded: int = 8
) -> LogitErrors:
    """Run a port beside its model.

    Args:
        model: a small model of transformers in FP32.
        port: the port's class as FILE:CLASS.
        architecture: the model's description, which says how its weights are packed; plain by default.
        prompt: tokens that are prefilled.
        decoded: tokens that are fed one by one afterwards.

    Raises:
        InputError: the port cannot be built.
    """
    activate()
    join_alone()
    port_class = load_class(parse_class(port))
    tokens = tokens_for(model.config, 2, prompt + decoded)
    with tempfile.TemporaryDirectory(prefix="sleuth-parity-") as scratch:
        folder = Path(scratch)
        if not isinstance(architecture, Architecture) or architecture.packing is None:
            model.save_pretrained(folder)
        else:
            save_checkpoint(model, architecture, folder)
            model = load_model(ModelSource(folder, attention="eager"), torch.float32)
        source = _source(model.config) if is_encoder_decoder(model.config) else None
        options = {} if source is None else {"source_len": 2 * _LENGTH}
        settings = CpuSettings(torch.float32, 1, tokens.shape[0], _LENGTH, options)
        config = build_config(port_class, port_class.get_config_cls(), folder, settings)
        application = build_application(port_class, config, folder, 0, 1)
    drive = drive_of(application, distinct_models(application)[0], settings, 0)
    found, expected = (_logits(m, tokens, prompt, source) for m in (drive, adapter_of(model)))
    return LogitErrors(_distance(found[:1], expected[:1]), _distance(found[1:], expected[1:]))


def _source(config: Any) -> Source:
    """What an encoder reads: rows of different lengths."""
    ids = tokens_for(config, 2, 25, seed=3)
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    return Source(ids, mask)


def _logits(model: Any, tokens: torch.Tensor, prompt: int, source: Source | None) -> torch.Tensor:
    """Logits of the last position of every pass, (passes, batch, vocabulary)."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits, cache = model(tokens[:, :prompt], torch.ones_like(tokens[:, :prompt]), positions[:, :prompt], source)
    collected = [logits[:, -1]]
    for position in range(prompt, tokens.shape[1]):
        mask = torch.ones_like(tokens[:, : position + 1])
        here = slice(position, position + 1)
        logits, cache = model(tokens[:, here], mask, positions[:, here], cache)
        collected.append(logits[:, -1])
    return torch.stack(collected)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
