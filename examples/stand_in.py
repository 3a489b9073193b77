"""A second implementation of the example Llama that plays the port under test. It is NOT a Neuron run.

No accelerator, compiler or NxD Inference code is involved: this is plain PyTorch on the CPU, written apart
from transformers, with the module paths and output structures that NxD Inference shows. It differs from
transformers where a real port does, and only there:

* Q, K and V are one fused projection (``qkv_proj.Wqkv``); ``rotary_emb`` runs in layer 0 and later layers
  reuse its result; prefill computes logits for the last real position only.
* ``o_proj`` and ``down_proj`` are row-parallel: ``tp`` partial products, each rounded to the model's dtype and
  then summed, as an all-reduce does. ``lm_head`` is split by columns and concatenated.
* Attention is a masked softmax in FP32 over a KV cache held as one pair of tensors per layer.

:mod:`.stand_in_layers` holds the layers, :mod:`.faults` the bugs that can be planted.

Shapes use b batch, s new positions, p cached positions, h hidden size, g KV heads, d head size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .faults import CLEAN, FAULTS
from .stand_in_layers import ColumnParallel, Parts, Settings

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StandInOutput:
    """FP32 ``logits`` [b, 1, V] of the last real position; ``cache``: K and V per layer, [b, g, p + s, d]."""

    logits: Tensor
    cache: Cache


class StandIn(nn.Module):
    """The whole model: prefill without a cache, decode with the cache of the previous call."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        super().__init__()
        self.settings = settings
        self.last_real = parts.last_real
        self.embed_tokens = parts.embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(parts.layer(settings, index, parts) for index in range(settings.layers))
        self.norm = parts.norm(settings.hidden_size, settings.norm_epsilon)
        self.lm_head = ColumnParallel(settings.hidden_size, settings.vocab_size, settings.tp)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> StandInOutput:
        """Run prefill, or one decode step.

        Args:
            input_ids: token ids, [b, s]; rows shorter than s are padded on the right.
            position_ids: the position of every token, [b, s].
            attention_mask: True where a cached or new position is real, [b, p + s]; None means everywhere.
            cache: what the previous call returned; None at prefill.
        """
        batch, new = input_ids.shape
        hidden = self.embed_tokens(input_ids)
        if cache is None:
            empty = hidden.new_empty(batch, self.settings.kv_heads, 0, self.settings.head_dim)
            cache = [(empty, empty)] * self.settings.layers
        width = cache[0][0].shape[2] + new
        mask = torch.ones(batch, width) if attention_mask is None else attention_mask
        mask = mask.bool()
        angles, present = None, []
        for layer, past in zip(self.layers, cache, strict=True):
            hidden, pair, cos, sin, _ = layer(hidden, position_ids, mask, past, angles)
            angles = cos, sin
            present.append(pair)
        last = self.last_real(mask[:, -new:])
        rows = self.norm(hidden)[torch.arange(batch), last].unsqueeze(1)
        return StandInOutput(self.lm_head(rows).float(), present)


def read_settings(folder: Path, tp: int) -> Settings:
    """Read ``config.json``; the rotary settings stand under one name in transformers 4 and another in 5."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **config["rope_scaling"]}
    return Settings(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        query_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        norm_epsilon=config["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        rope_factor=rope["factor"],
        rope_positions=rope["original_max_position_embeddings"],
        rope_beta_fast=rope["beta_fast"],
        rope_beta_slow=rope["beta_slow"],
        rope_multiplier=0.1 * math.log(rope["factor"]) + 1.0,
        tp=tp,
    )


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' weights to this layout: no ``model.`` prefix, Q, K and V stacked into ``Wqkv``."""
    plain = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    fused = {name: tensor for name, tensor in plain.items() if ".self_attn." not in name}
    for name, tensor in plain.items():
        if name.endswith(".o_proj.weight"):
            attention = name.removesuffix(".o_proj.weight")
            stack = [plain[f"{attention}.{letter}_proj.weight"] for letter in "qkv"]
            fused[f"{attention}.qkv_proj.Wqkv.weight"] = torch.cat(stack)
            fused[name] = tensor
    return fused


def load(folder: Path | str, dtype: torch.dtype, fault: str | None = None, tp: int = 2) -> StandIn:
    """Build the stand-in from a transformers model folder.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        dtype: what weights and activations are held in.
        fault: the name of a bug in :data:`.faults.FAULTS` to plant; None builds the correct port.
        tp: the tensor-parallel degree whose rounding is imitated.

    Raises:
        ValueError: ``fault`` is not the name of a fault.
    """
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"no fault is called {fault!r}; there are: {', '.join(sorted(FAULTS))}")
    planted = CLEAN if fault is None else FAULTS[fault]
    settings = planted.settings(read_settings(Path(folder), tp))
    model = StandIn(settings, planted.parts)
    weights = planted.weights(convert(load_file(Path(folder) / "model.safetensors")))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()
