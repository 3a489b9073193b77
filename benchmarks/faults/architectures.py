"""Five small models with weights like trained ones, made on the spot and kept in a cache folder.

Random normal weights would flatter the analysis: attention would be uniform, biases and gains without effect. So every
model starts with a falling spectrum, gains spread around 1, non-zero biases and three outlier channels in the residual
stream, and is trained on the bytes of the English prose that ships with Python. Weights are rounded to BF16, as in
released checkpoints: an FP32 and a BF16 run start from the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tensorsleuth.examples.train_tiny_llama import documents
from torch import Tensor

VOCABULARY = 260
PAD = 258
WINDOW = 8
SEED = 20
STEPS, BATCH, CONTEXT, PEAK_RATE = 240, 16, 64, 3e-3
OUTLIERS = (7, 40, 101)
#: Changes with every change of how weights are made, so that an old cache is not used.
RECIPE = 3

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: what the benchmark calls it.
        config_class: configuration class of transformers.
        extra: its arguments beyond `SIZES`.
        features: what it has, by name: faults ask for these.
    """

    name: str
    config_class: str
    extra: dict[str, Any]
    features: frozenset[str]

    def config(self) -> Any:
        """Its configuration."""
        return getattr(transformers, self.config_class)(**{**SIZES, **self.extra})


def _features(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        Architecture(
            "llama",
            "LlamaConfig",
            {
                "attention_bias": True,
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            _features("dense qkv_bias square_q rope_scaling early_cast"),
        ),
        Architecture(
            "qwen3",
            "Qwen3Config",
            {"head_dim": 32, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
            _features("dense qk_norm early_cast"),
        ),
        Architecture(
            "gemma2",
            "Gemma2Config",
            {
                "query_pre_attn_scalar": 32,
                "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 15.0,
                "sliding_window": WINDOW,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            _features("dense window softcap offset_norm embedding_scale square_q"),
        ),
        Architecture(
            "mixtral",
            "MixtralConfig",
            {"num_local_experts": 6, "num_experts_per_tok": 2, "rope_theta": 1000000.0, "sliding_window": None},
            _features("moe split_experts square_q early_cast"),
        ),
        Architecture(
            "gpt_oss",
            "GptOssConfig",
            {
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 2,
                "sliding_window": WINDOW,
                "rope_theta": 150000.0,
                "attention_bias": True,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "original_max_position_embeddings": 64,
                    "truncate": False,
                },
            },
            _features("moe fused_experts sinks window qkv_bias router_bias rope_scaling square_q"),
        ),
    )
}


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run in any precision."""

    architecture: Architecture
    folder: Path

    def model(self, dtype: torch.dtype) -> Any:
        """A fresh model; the caller may change it."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation="eager")
        return model.requires_grad_(False).eval()


def checkpoint(name: str, store: Path, steps: int = STEPS) -> Checkpoint:
    """The trained model of an architecture; made, in about a minute, when the cache does not hold it."""
    architecture = ARCHITECTURES[name]
    recipe = json.dumps([RECIPE, SIZES, architecture.extra, SEED, steps, BATCH, CONTEXT, PEAK_RATE], sort_keys=True)
    folder = store / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not (folder / "model.safetensors").exists():
        _make(architecture, folder, steps)
    return Checkpoint(architecture, folder)


@cache
def token_stream(size: int = 1 << 18) -> Tensor:
    """The first bytes of the training text, `[size]` int64."""
    text = bytearray()
    for document in documents():
        text += document.encode() + b"\n\n"
        if len(text) >= size:
            break
    return torch.frombuffer(text[:size], dtype=torch.uint8).long()


def _make(architecture: Architecture, folder: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(architecture.config(), attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, generator, offset_norm="offset_norm" in architecture.features)
    _train(model, generator, steps, moe="moe" in architecture.features)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)


def _initialise(name: str, parameter: Tensor, generator: torch.Generator, *, offset_norm: bool) -> None:
    """Draw one parameter: gains around 1, biases and sinks away from 0, matrices with a power-law spectrum."""
    noise = torch.randn(parameter.shape, generator=generator)
    outliers = torch.tensor(OUTLIERS)
    if "norm" in name:
        gain = (0.35 * noise).exp()
        if parameter.shape[0] > outliers.max():
            gain[outliers] *= 0.15
        parameter.copy_(gain - 1.0 if offset_norm else gain)
    elif name.endswith(("bias", "sinks")) or parameter.ndim == 1:
        parameter.copy_(0.3 * noise)
    elif "embed_tokens" in name:
        noise[:, outliers] *= 8.0
        parameter.copy_(noise * (0.06 if offset_norm else 0.3))
    else:
        left, scales, right = torch.linalg.svd(noise, full_matrices=False)
        falling = torch.arange(1, scales.shape[-1] + 1) ** -0.6
        matrix = (left * falling) @ right
        # Stacked experts of gpt-oss are [experts, in, out]; every other matrix is [out, in].
        fan_in = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
        matrix *= 1.0 / (matrix.square().mean().sqrt() * math.sqrt(fan_in))
        if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            matrix[outliers] *= 6.0
        parameter.copy_(matrix)


def _train(model: Any, generator: torch.Generator, steps: int, *, moe: bool) -> None:
    tokens = token_stream()
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    extra = {"output_router_logits": True} if moe else {}
    model.train()
    for step in range(steps):
        rate = PEAK_RATE * min((step + 1) / 20, 0.05 + 0.95 * (1 - step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        ids = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])
        loss = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()


def prompts(count: int = 12, shortest: int = 18, longest: int = 26) -> list[tuple[int, ...]]:
    """Prompts of different lengths, cut from the training text at fixed places."""
    tokens = token_stream()
    generator = torch.Generator().manual_seed(SEED + 1)
    starts = torch.randint(len(tokens) - longest, (count,), generator=generator).tolist()
    lengths = [shortest + number * (longest - shortest) // max(count - 1, 1) for number in range(count)]
    return [tuple(tokens[s : s + n].tolist()) for s, n in zip(starts, lengths, strict=True)]
