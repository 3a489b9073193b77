"""The import block of a port: every name that its text uses, from where NxD Inference keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NXD = "neuronx_distributed"
_NXDI = "neuronx_distributed_inference"
_MODULES: dict[str, tuple[str, ...]] = {
    "transformers.activations": ("ACT2FN",),
    "transformers.models.llama.modeling_llama": ("LlamaRMSNorm",),
    f"{_NXD}.modules.moe.routing": ("RouterTopK",),
    f"{_NXD}.parallel_layers.layers": (
        "BaseParallelLinear",
        "ColumnParallelLinear",
        "ParallelEmbedding",
        "RowParallelLinear",
        "SPMDRank",
    ),
    f"{_NXD}.parallel_layers.utils": ("set_tensor_model_parallel_attributes",),
    f"{_NXD}.parallel_layers.mappings": ("reduce_from_tensor_model_parallel_region",),
    f"{_NXD}.utils": ("cpu_mode",),
    f"{_NXDI}.models.application_base": ("NeuronApplicationBase",),
    f"{_NXDI}.models.config": ("InferenceConfig", "MoENeuronConfig", "NeuronConfig"),
    f"{_NXDI}.models.llama.modeling_llama": ("Llama3RotaryEmbedding", "NeuronLlamaMLP"),
    f"{_NXDI}.models.model_base": ("NeuronBaseForCausalLM", "NeuronBaseModel"),
    f"{_NXDI}.models.model_wrapper": (
        "CONTEXT_ENCODING_MODEL_TAG",
        "TOKEN_GENERATION_MODEL_TAG",
        "BaseModelInstance",
        "ModelWrapper",
    ),
    f"{_NXDI}.modules.attention.attention_base": (
        "FlashAttentionStrategy",
        "NeuronAttentionBase",
        "NeuronAttentionBaseOutput",
    ),
    f"{_NXDI}.modules.attention.gqa": ("GQA", "maybe_pad_interleaved", "maybe_pad_tail", "replicate_kv"),
    f"{_NXDI}.modules.attention.utils": ("RotaryEmbedding", "apply_rotary_pos_emb", "manual_softmax", "repeat_kv"),
    f"{_NXDI}.modules.custom_calls": ("CustomRMSNorm",),
    f"{_NXDI}.modules.moe_v2": ("initialize_moe_module",),
    f"{_NXDI}.utils.hf_adapter": ("load_pretrained_config",),
}
_PLAIN = {
    "copy": "import copy",
    "math": "import math",
    "os": "import os",
    "torch": "import torch",
    "nn": "from torch import nn",
}


def imports_for(text: str, transformers_names: Iterable[str]) -> str:
    """Import statements for the names that a module's text uses, in groups.

    Args:
        text: the module without imports.
        transformers_names: names that come from transformers' top level.
    """
    groups: list[list[str]] = [[], [], []]
    for name, statement in _PLAIN.items():
        if _uses(text, name):
            groups[0 if name in ("copy", "math", "os") else 1].append(statement)
    top = sorted(name for name in transformers_names if _uses(text, name))
    if top:
        groups[1].append(f"from transformers import {', '.join(top)}")
    for module, names in _MODULES.items():
        used = [name for name in names if _uses(text, name)]
        if used:
            groups[1].append(f"from {module} import {', '.join(used)}")
    return "\n\n".join("\n".join(group) for group in groups if group)


def _uses(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\b", text) is not None
