"""Driving Hugging Face encoder-decoders: the encoder runs at prefill, the decoder's tokens are the positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from ..store.errors import InputError
from .generate import CausalModel, Source
from .hf import HuggingFaceCausalModel, is_encoder_decoder

#: Key of configurations whose decoder knows distances only: padding on its left changes nothing.
_RELATIVE = "relative_attention_num_buckets"


class HuggingFaceEncoderDecoder:
    """Adapts a transformers encoder-decoder to `generate.CausalModel`; prompts are its decoder's tokens."""

    def __init__(self, model: Any) -> None:
        """Drive a model of class `...ForConditionalGeneration`."""
        self.model = model
        self._relative = hasattr(model.config, _RELATIVE)

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """See `generate.CausalModel`; `cache` is the source at prefill.

        Raises:
            InputError: decoder tokens are padded, and the model would count the padding as positions.
        """
        if not self._relative and attention_mask is not None and not bool(attention_mask.all()):
            raise InputError(
                f"{type(self.model).__name__} counts padding as positions; use a batch size of 1, or prompts with as "
                "many decoder_ids each"
            )
        if cache is None:
            raise NotImplementedError("an encoder-decoder cannot run without a source")
        if isinstance(cache, Source):
            read: dict[str, Any] = {"input_ids": cache.ids, "attention_mask": cache.mask}
        else:
            states, mask, past = cache
            encoded = BaseModelOutput(last_hidden_state=states)
            read = {"encoder_outputs": encoded, "attention_mask": mask, "past_key_values": past}
        output = self.model(**read, decoder_input_ids=input_ids, decoder_attention_mask=attention_mask, use_cache=True)
        return output.logits, (output.encoder_last_hidden_state, read["attention_mask"], output.past_key_values)


def adapter_of(model: torch.nn.Module) -> CausalModel:
    """The adapter that drives a model of transformers."""
    if is_encoder_decoder(getattr(model, "config", None)):
        return HuggingFaceEncoderDecoder(model)
    return HuggingFaceCausalModel(model)


def start_token(config: Any) -> int | None:
    """The token that the decoder of an encoder-decoder begins with, None for other models.

    Raises:
        InputError: the configuration does not name it.
    """
    if not is_encoder_decoder(config):
        return None
    for name in ("decoder_start_token_id", "pad_token_id"):  # T5's decoder starts with padding
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise InputError(f"the configuration of {config.model_type} has no decoder_start_token_id; give it one")
