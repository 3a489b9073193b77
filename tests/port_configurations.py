"""Architectures whose ports are tested, each by a configuration of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
_BIASES = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8, "tie_word_embeddings": True}
_PHI3_LONG = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": _LONGROPE,
}

_DEEPSEEK_V2 = {
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "norm_topk_prob": False,
}
_DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

#: Model type, and what differs from its default configuration.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_scaling": _YARN}),
    "llama-biases": ("llama", _BIASES),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"num_key_value_heads": 8}),
    "mistral": ("mistral", {"head_dim": 128}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", _PHI3_LONG),
    "granite": ("granite", {}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "stablelm": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm-norms": ("stablelm", {"qk_layernorm": True}),
    "starcoder2": ("starcoder2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8}),
    "falcon-multi-query": ("falcon", {"multi_query": True}),
    "smollm3": ("smollm3", {}),
    "ernie4_5": ("ernie4_5", {}),
    "helium": ("helium", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "gptj": ("gptj", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "persimmon": ("persimmon", {}),
    "biogpt": ("biogpt", {}),
    "arcee": ("arcee", {}),
    "seed_oss": ("seed_oss", {}),
    "exaone4": ("exaone4", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 128, "num_key_value_heads": 8}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {}),
    "flex_olmo": ("flex_olmo", {}),
    "granitemoe": ("granitemoe", {}),
    "phimoe": ("phimoe", {}),
    "glm4_moe": ("glm4_moe", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss-mxfp4": ("gpt_oss", {"quantization_config": _MXFP4}),
    "deepseek_v2": ("deepseek_v2", _DEEPSEEK_V2),
    "deepseek_v3": ("deepseek_v3", {"rope_scaling": _DEEPSEEK_YARN}),
    "deepseek_v3-fp8": ("deepseek_v3", {"rope_scaling": _DEEPSEEK_YARN, "quantization_config": _FP8}),
    "t5": ("t5", {}),
    "flan-t5": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", {}),
    "umt5": ("umt5", {}),
}


def configuration(name: str) -> PretrainedConfig:
    """The configuration of an architecture."""
    model_type, changes = CONFIGURATIONS[name]
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**changes).get_text_config()
    return config
