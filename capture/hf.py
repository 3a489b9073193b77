"""Capturing Hugging Face causal language models, from a folder or from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..store.errors import InputError
from .packed import block_size, packed_weights, packing_of, unpacked
from .widening import is_too_large, widen_by_layer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        path: a folder with config.json and weights, or a config.json (or a folder with only that).
        seed: seed of a random initialisation, None to load weights.
        trust_remote_code: run modelling code that lies in the folder.
        attention: attention implementation, None for the library's default.
        by_layer: keep weights in the dtype in which they are stored and widen a layer when it runs; None where a wider
            dtype would not fit in memory.
    """

    path: Path
    seed: int | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    by_layer: bool | None = None


class HuggingFaceCausalModel:
    """Adapts a transformers causal LM to `generate.CausalModel`."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Look up which arguments the model's forward takes."""
        self.model = model
        self._accepted = set(inspect.signature(model.forward).parameters)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Any,
        *,
        use_cache: bool = True,
    ) -> tuple[torch.Tensor, Any]:
        """See `generate.CausalModel`; without `use_cache` modules may be called again with the same arguments."""
        extra: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        known = {name: value for name, value in extra.items() if name in self._accepted}
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=use_cache, **known)
        return output.logits, output.past_key_values


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype by name or usual abbreviation (`bf16`).

    Raises:
        InputError: models cannot run in it here.
    """
    full = _DTYPE_ALIASES.get(name, name)
    if full not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)} (or fp32, bf16, fp16, fp64)")
    return DTYPES[full]


def load_config(source: ModelSource) -> Any:
    """The configuration of a model.

    Raises:
        InputError: the path is missing or holds no configuration that transformers knows.
    """
    if not source.path.exists():
        raise InputError(f"model folder {source.path} does not exist; name a folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source.path} holds no model that transformers knows: {_first_line(error)}") from error
    if type(config) not in model_family(config)._model_mapping and not getattr(config, "auto_map", None):
        raise InputError(f"{source.path} is a {config.model_type} model, not a causal language model")
    return config


def is_encoder_decoder(config: Any) -> bool:
    """Whether a configuration is that of a model whose encoder reads text."""
    return bool(getattr(config, "is_encoder_decoder", False)) and type(config) in AutoModelForSeq2SeqLM._model_mapping


def model_family(config: Any) -> Any:
    """The class of transformers that builds a configuration's language model."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def load_model(source: ModelSource, dtype: torch.dtype) -> torch.nn.Module:
    """The model in evaluation mode.

    A random initialisation is drawn in FP32 and then cast, so that runs of different dtypes share their weights;
    buffers that the model keeps in FP32 (rotary frequencies) stay so. Packed weights (MXFP4, FP8 and INT8 with scales)
    are unpacked. Weights that would not fit in memory in a wider dtype than they are stored in are widened layer by
    layer; the values are the same.

    Raises:
        InputError: there are no weights, or they do not fit.
    """
    config = load_config(source)
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.attention:
        options["attn_implementation"] = source.attention
    try:
        if source.seed is not None:
            return _random_model(config, source.seed, dtype, options)
        folder = source.path if source.path.is_dir() else source.path.parent
        if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            raise InputError(f"{folder} holds no weights; add --random-init SEED to run the configuration without them")
        model_class, state = model_family(config), _unpacked_weights(config, folder)
        if state is not None:
            del config.quantization_config
            model_class = AutoModelForCausalLM._model_mapping[type(config)]
            options |= {"config": config, "state_dict": state}
        by_layer = state is None and _by_layer(source, folder, dtype)
        model: torch.nn.Module = model_class.from_pretrained(
            None if state is not None else folder,
            dtype="auto" if by_layer else dtype,
            local_files_only=True,
            **options,
        )
        if by_layer:
            build = partial(_from_config, config, options)
            model = widen_by_layer(model, dtype, build)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{source.path} cannot be loaded: {_first_line(error)}") from error
    return model.eval()


def _from_config(config: Any, options: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    model: torch.nn.Module = model_family(config).from_config(config, dtype=dtype, **options)
    return model


def _by_layer(source: ModelSource, folder: Path, dtype: torch.dtype) -> bool:
    """Whether weights are widened by layer: as asked, else where they would not fit."""
    if dtype not in (torch.float32, torch.float64):
        return False
    return is_too_large(folder, dtype) if source.by_layer is None else source.by_layer


def _unpacked_weights(config: Any, folder: Path) -> dict[str, torch.Tensor] | None:
    """A checkpoint's weights, unpacked; None where nothing is packed in a way that is known here."""
    if not packing_of(config) or type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return unpacked(state, block_size(config)) if packed_weights(tuple(state)) else None


def _random_model(config: Any, seed: int, dtype: torch.dtype, options: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(seed)
    full = _from_config(config, options, torch.float32)
    if dtype is torch.float32:
        return full.eval()
    model = _from_config(config, options, dtype)
    model.load_state_dict(full.state_dict())
    return model.eval()


def load_tokenizer(source: ModelSource) -> Callable[[str], list[int]] | None:
    """Text to token ids, or None when the folder has no tokenizer."""
    folder = source.path if source.path.is_dir() else source.path.parent
    if not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=source.trust_remote_code)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    return tokenize


def position_limit(config: Any) -> int | None:
    """How many token positions a model has, None when its configuration does not say."""
    text = config.get_text_config()
    for name in _POSITION_LIMITS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return None


def stop_tokens(config: Any) -> frozenset[int]:
    """End-of-sequence token ids of a configuration."""
    value = getattr(config.get_text_config(), "eos_token_id", None)
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, (list, tuple)) else [value])


def checkpoint_fingerprint(source: ModelSource) -> str:
    """XXH3-128 over the files a model is made of: configuration and weights, or configuration and seed."""
    digest = xxhash.xxh3_128()
    folder = source.path if source.path.is_dir() else source.path.parent
    config = source.path / "config.json" if source.path.is_dir() else source.path
    files = [config]
    if source.seed is None:
        files += sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    else:
        digest.update(f"seed:{source.seed};".encode())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def quiet_transformers() -> None:
    """Keep transformers' warnings and progress bars off the terminal; errors still raise."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
