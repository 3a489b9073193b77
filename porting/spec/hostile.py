"""A small model of an architecture in which nothing is equal by accident.

Sizes are distinct and awkward (a vocabulary that no number of ranks divides, heads whose product is not the hidden
size, KV heads that two ranks do not divide), factors are not 1, windows are shorter than the prompts, norms are not 1
and biases not 0. A port that is right here has no symmetry to hide behind.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...capture.hf import is_encoder_decoder, model_family
from ...capture.packed import MXFP4, packing_of
from ...store.errors import InputError

#: Small values by configuration key. Keys that a configuration lacks stay out.
_SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 112,
    "ffn_dim": 112,
    "ffn_hidden_size": 112,
    "word_embed_proj_dim": 96,
    "num_attention_heads": 6,
    "head_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "sliding_window": 7,
    "attention_chunk_size": 8,
    "rotary_dim": 8,
    "num_experts": 12,
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 80,
    "shared_expert_intermediate_size": 72,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "d_ff": 112,
    "d_kv": 24,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 13,
}
#: Where the size of heads has a key of its own and ranks pad heads, a number that no number of ranks divides.
_HEADS_TO_PAD = 5
#: Absent or null in many configurations, where they switch a feature off.
_SWITCHES = ("sliding_window", "attention_chunk_size", "q_lora_rank", "n_group", "topk_group", "n_shared_experts")
_TIED_HEAD_DIM = _SIZES["hidden_size"] // _SIZES["num_attention_heads"]
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
#: A width that consists of whole blocks of 32.
_WHOLE_BLOCKS = 160
#: Factors that are 1 (or what the size dictates) in many configurations, and would then go unseen.
_FACTORS: dict[str, float] = {
    "attention_multiplier": 0.23,
    "embedding_multiplier": 1.7,
    "residual_multiplier": 0.61,
    "logits_scaling": 1.9,
    "logit_scale": 0.37,
    "query_pre_attn_scalar": 29.0,
    "attn_logit_softcapping": 2.5,
    "final_logit_softcapping": 3.5,
    "clip_qkv": 1.1,
    "routed_scaling_factor": 1.3,
    "router_jitter_noise": 0.2,
}
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_EPSILON = 3e-4
#: Dropout, and what else differs between training and inference.
_SILENT = ("dropout", "pdrop", "drop_prob")
_PER_LAYER = ("layer_types", "no_rope_layers", "rope_layers", "mlp_layer_types")
_SCALE_OF_BIAS = 0.3
_SCALE_OF_NORM = 0.3


def small_config(config: Any, *, free_head_dim: bool = True) -> Any:
    """A configuration of the same architecture with small, awkward sizes.

    Args:
        config: the configuration of the model.
        free_head_dim: whether heads times their size may differ from the hidden size, where there is a key for it.
    """
    small = copy.deepcopy(config)
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    wanted = {key: value for key, value in _SIZES.items() if key in known}
    if "head_dim" in wanted and (not free_head_dim or config.head_dim is None):
        wanted["head_dim"] = None if config.head_dim is None else _TIED_HEAD_DIM
    for key in (*_SWITCHES, "bos_token_id"):
        if not getattr(config, key, None):
            wanted.pop(key, None)
    if getattr(config, "num_experts_per_tok", None) == 2:  # routers that take two take no other number
        wanted["num_experts_per_tok"] = 2
    if getattr(config, "n_group", None) == 1:  # one group is none
        wanted.update(n_group=1, topk_group=1)
    if "qk_rope_head_dim" in wanted:  # configurations of latent attention call the rotated part the head
        wanted["head_dim"] = wanted["qk_rope_head_dim"]
        wanted["qk_head_dim"] = wanted["qk_rope_head_dim"] + wanted["qk_nope_head_dim"]
    if "d_kv" in known:
        wanted["num_attention_heads"] = _HEADS_TO_PAD
    for key in _KV_HEADS:
        if key in known:
            wanted[key] = _kv_heads(config, key)
    wanted.update({key: value for key, value in _FACTORS.items() if getattr(config, key, None) is not None})
    wanted.update({key: _EPSILON for key in _EPSILONS if key in known})
    wanted.update({key: 0.0 for key in known if any(word in key for word in _SILENT) and _is_number(config, key)})
    layers = _layers(config)
    wanted["num_hidden_layers"] = len(layers)
    for key in _PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == config.num_hidden_layers:
            wanted[key] = [values[layer] for layer in layers]
    for key, value in wanted.items():
        setattr(small, key, value)
    _shorten_factors(small)
    _unpack(small)
    small.eos_token_id = None
    small.use_cache = True
    return small


def _kv_heads(config: Any, key: str) -> int:
    heads = getattr(config, key)
    if heads in (None, config.num_attention_heads):
        return int(_SIZES["num_attention_heads"])
    return 1 if heads == 1 else 3


def _layers(config: Any) -> list[int]:
    """Layers that hold every kind, and one after the last kind begins: caches are then read after a switch."""
    total = config.num_hidden_layers
    kinds = []
    for layer in range(total):
        values = (getattr(config, key, None) for key in _PER_LAYER)
        kinds.append(tuple(str(v[layer]) for v in values if isinstance(v, (list, tuple)) and len(v) == total))
    firsts = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))
    chosen = firsts if len(firsts) > 1 else [0, min(1, total - 1)]
    return sorted(set(chosen)) if len(firsts) == 1 else [*firsts, *([firsts[0]] if kinds[0] != kinds[-1] else [])]


def _shorten_factors(config: Any) -> None:
    """Lists of rotary factors have one entry per pair of features."""
    scaling = getattr(config, "rope_scaling", None)
    if not isinstance(scaling, dict):
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(head_dim * getattr(config, "partial_rotary_factor", 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(scaling.get(key), list):
            scaling[key] = [1.0 + 0.07 * index for index in range(pairs)]


def _unpack(config: Any) -> None:
    """The small model is not packed; its sizes can be (4-bit floats come in blocks)."""
    packing = packing_of(config)
    if packing:
        del config.quantization_config
    if packing.get("quant_method") == MXFP4:
        config.intermediate_size = _WHOLE_BLOCKS


def _is_number(config: Any, key: str) -> bool:
    value = getattr(config, key, None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def hostile_model(config: Any, seed: int = 0) -> Any:
    """A small random model of a configuration, with heads as wide as its code allows.

    Args:
        config: the configuration of the model to port.
        seed: of the weights.

    Raises:
        InputError: transformers cannot build it, or it does not run.
    """
    reason = ""
    for free_head_dim in (True, False):
        small = small_config(config, free_head_dim=free_head_dim)
        model = random_model(small, seed)
        try:
            with torch.no_grad():
                model(input_ids=tokens_for(small), use_cache=False, **decoder_inputs(small))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        return model
    raise InputError(f"unsupported: a small {config.model_type} does not run: {reason}")


def random_model(config: Any, seed: int = 0) -> Any:
    """A model with random weights: norms away from where they begin, biases away from 0.

    Raises:
        InputError: transformers cannot build the configuration.
    """
    model = _built(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(_SCALE_OF_BIAS * noise)
            elif parameter.ndim < 2 or "norm" in name.lower():
                parameter.copy_(parameter.mean() + _SCALE_OF_NORM * noise)
            elif parameter.ndim == 2:
                fan_in = parameter.shape[0] if _is_conv(model, name) else parameter.shape[1]
                parameter.copy_(noise * _gain(config, name) / fan_in**0.5)
            else:
                parameter.copy_(noise / max(parameter.shape[1:]) ** 0.5)
        kept = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point() and buffer.ndim == 1:
                buffer.copy_(_SCALE_OF_BIAS * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def _gain(config: Any, name: str) -> float:
    """Factor on a weight: T5 does not scale scores, its queries are that much smaller.

    Without it, attention is nearly a maximum, which amplifies rounding from layer to layer.
    """
    return float(config.d_kv**-0.5) if hasattr(config, "d_kv") and name.endswith(".q.weight") else 1.0


def _built(config: Any, seed: int) -> Any:
    """A model as its classes initialise it; where the library's own initialisation fails, as constructors do."""
    torch.manual_seed(seed)
    family = model_family(config)
    try:
        try:
            return family.from_config(config, attn_implementation="eager").float()
        except AttributeError:
            from transformers.modeling_utils import no_init_weights

            with no_init_weights():
                return family.from_config(config, attn_implementation="eager").float()
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(f"{config.model_type} cannot be built small: {type(error).__name__}: {error}") from error


def _is_conv(model: torch.nn.Module, name: str) -> bool:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


def tokens_for(config: Any, batch: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    """Random token ids, (batch, length); padding and special tokens do not occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, config.get_text_config().vocab_size, (batch, length), generator=generator)


def decoder_inputs(config: Any, batch: int = 2, length: int = 15, seed: int = 2) -> dict[str, torch.Tensor]:
    """What an encoder-decoder is given beside the source: tokens of another number; nothing for other models."""
    if not is_encoder_decoder(config):
        return {}
    return {"decoder_input_ids": tokens_for(config, batch, length, seed)}
