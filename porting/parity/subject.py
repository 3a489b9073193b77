"""What the gate runs a model on, and how it is compared: decoder-only models and encoder-decoders."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...capture.prompts import PromptInput
from ..spec.encoder_decoder_facts import AnyArchitecture, EncoderDecoder
from .components import component_mapping_text, parts_of_experts, sizes_of
from .encoder_decoder_components import encoder_decoder_mapping
from .hostile_checkpoint import save_checkpoint

#: Sources are longer or shorter than what the decoder begins with, by turns, by this factor of its length.
_SOURCE_LENGTHS = (1.7, 0.6)


def prompts_for(architecture: AnyArchitecture, lengths: Sequence[int], vocabulary: int, seed: int) -> list[PromptInput]:
    """Random prompts; special tokens do not occur. In encoder-decoders, lengths are those of the decoder's tokens."""
    rng = np.random.default_rng(seed)
    tokens = {n: tuple(int(token) for token in rng.integers(2, vocabulary, n)) for n in lengths}
    if not isinstance(architecture, EncoderDecoder):
        return [PromptInput(str(n), token_ids=ids) for n, ids in tokens.items()]
    prompts = []
    for number, (n, ids) in enumerate(tokens.items()):
        source = rng.integers(2, vocabulary, max(int(_SOURCE_LENGTHS[number % 2] * n), 1))
        prompts.append(PromptInput(str(n), token_ids=tuple(int(token) for token in source), decoder_ids=ids))
    return prompts


def save(model: Any, architecture: AnyArchitecture, folder: Path, seed: int) -> None:
    """Write the small model, packed as the architecture says."""
    if isinstance(architecture, EncoderDecoder):
        model.save_pretrained(folder)
    else:
        save_checkpoint(model, architecture, folder, seed)


def left_out(architecture: AnyArchitecture) -> tuple[str, ...]:
    """Globs of modules that the port has no counterpart of."""
    return () if isinstance(architecture, EncoderDecoder) else tuple(parts_of_experts(architecture))


def mapping_text(architecture: AnyArchitecture, config: Any, tp: int, recorded: Collection[tuple[str, str]]) -> str:
    """A component_mapping.json for a comparison of the model with its port.

    Args:
        architecture: the architecture.
        config: of the model that was run.
        tp: number of ranks.
        recorded: module and slot of every site that the reference has.
    """
    if isinstance(architecture, EncoderDecoder):
        return json.dumps(encoder_decoder_mapping(architecture, config, tp, recorded), indent=1)
    return component_mapping_text(architecture, sizes_of(architecture, config, tp), recorded)
