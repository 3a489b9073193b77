"""Qwen2Moe for NxD Inference.

Ported from Qwen2MoeForCausalLM (transformers.models.qwen2_moe.modeling_qwen2_moe).
What the architecture is, and where every fact comes from, is in architecture.json beside this file.
"""

import copy

import torch
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase
from neuronx_distributed_inference.modules.attention.utils import RotaryEmbedding
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
from torch import nn
from transformers import Qwen2MoeForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def get_rmsnorm_cls():
    """The device's kernel; on a CPU, where there is none, plain operators."""
    return LlamaRMSNorm if cpu_mode() else CustomRMSNorm


class Qwen2MoeNeuronConfig(MoENeuronConfig):
    """How the model runs on Neuron."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attn_cls = NeuronQwen2MoeAttention


class Qwen2MoeInferenceConfig(InferenceConfig):
    """The model's configuration, by the names it has in transformers."""

    def add_derived_config(self):
        self.num_cores_per_group = 1
        self.sharded_kv_heads = sharded_kv_heads(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.neuron_config.tp_degree,
        )

    def get_required_attributes(self):
        return [
            "hidden_act",
            "hidden_size",
            "moe_intermediate_size",
            "num_attention_heads",
            "num_experts",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_key_value_heads",
            "pad_token_id",
            "rms_norm_eps",
            "rope_theta",
            "shared_expert_intermediate_size",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls):
        return Qwen2MoeNeuronConfig

    @classmethod
    def from_pretrained(cls, model_path, neuron_config=None, **kwargs):
        """Read a model folder's config.json."""
        neuron_config = neuron_config or cls.get_neuron_config_cls()()
        return cls(neuron_config, load_config=load_pretrained_config(model_path), **kwargs)


def sharded_kv_heads(heads, kv_heads, tp_degree):
    """How many KV heads ranks share out: where neither number divides the other, one for every query head."""
    return kv_heads if kv_heads % tp_degree == 0 or tp_degree % kv_heads == 0 else heads


class NeuronQwen2MoeAttention(NeuronAttentionBase):
    """Qwen2MoeAttention."""

    def __init__(self, config):
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.sharded_kv_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            rotary_emb=RotaryEmbedding(
                (config.hidden_size // config.num_attention_heads),
                max_position_embeddings=config.max_position_embeddings,
                base=config.rope_theta,
            ),
            num_cores_per_group=config.num_cores_per_group,
            qkv_bias=True,
        )


class NeuronQwen2MoeSharedExpert(nn.Module):
    """Qwen2MoeMLP: down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config, intermediate_size):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.gate_proj = ColumnParallelLinear(
            config.hidden_size,
            intermediate_size,
            bias=False,
            gather_output=False,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
        )
        self.up_proj = ColumnParallelLinear(
            config.hidden_size,
            intermediate_size,
            bias=False,
            gather_output=False,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
            reduce_dtype=config.neuron_config.rpl_reduce_dtype,
        )

    def forward(self, hidden_states):
        inner = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(inner)


def experts_config(config):
    """The configuration as the library's experts read it."""
    found = copy.deepcopy(config)
    found.num_local_experts = config.num_experts
    found.intermediate_size = config.moe_intermediate_size
    found.n_shared_experts = 0
    found.neuron_config.router_config.dtype = torch.float32
    found.neuron_config.router_config.act_fn = "softmax"
    found.neuron_config.normalize_top_k_affinities = False
    return found


class NeuronQwen2MoeMoE(nn.Module):
    """Qwen2MoeSparseMoeBlock: routed experts and a block that every token passes."""

    def __init__(self, config):
        super().__init__()
        self.moe = initialize_moe_module(config=experts_config(config))
        self.shared_expert = NeuronQwen2MoeSharedExpert(config, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False, dtype=config.neuron_config.torch_dtype)

    def forward(self, hidden_states, padding_mask=None):
        routed = self.moe(hidden_states, padding_mask)[0]
        shared = self.shared_expert(hidden_states)
        shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
        return (routed + shared,)


class NeuronQwen2MoeDecoderLayer(nn.Module):
    """Qwen2MoeDecoderLayer: pre-normed blocks, sequential residual."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = NeuronQwen2MoeAttention(config)
        self.post_attention_layernorm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = NeuronQwen2MoeMoE(config)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        **kwargs,
    ):
        after_input_layernorm = self.input_layernorm(hidden_states)
        attention = self.self_attn(
            after_input_layernorm,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            **kwargs,
        )
        residual = hidden_states + attention.hidden_states
        after_post_attention_layernorm = self.post_attention_layernorm(residual)
        after_mlp = self.mlp(after_post_attention_layernorm, kwargs.get("padding_mask"))[0]
        hidden_states = residual + after_mlp
        return hidden_states, attention.present_key_value, attention.cos_cache, attention.sin_cache, None


class NeuronQwen2MoeModel(NeuronBaseModel):
    """Embedding, layers, final norm and the projection to logits."""

    def setup_attr_for_model(self, config):
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.sharded_kv_heads
        self.max_batch_size = config.neuron_config.max_batch_size
        self.buckets = config.neuron_config.buckets

    def init_model(self, config):
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            self.padding_idx,
            dtype=config.neuron_config.torch_dtype,
            shard_across_embedding=True,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
        )
        self.layers = nn.ModuleList([NeuronQwen2MoeDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            pad=True,
            gather_output=not self.on_device_sampling,
            keep_padded_output=True,  # the base class masks the padding; narrowed, it would mask real tokens
            dtype=config.neuron_config.torch_dtype,
        )


#: The same inside a layer.
RENAMED_IN_LAYER = {
    "mlp.gate": "mlp.moe.router.linear_router",
}


class NeuronQwen2MoeForCausalLM(NeuronBaseForCausalLM):
    """Qwen2MoeForCausalLM on Neuron."""

    _model_cls = NeuronQwen2MoeModel

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        return Qwen2MoeForCausalLM.from_pretrained(model_path, **kwargs)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        neuron_config = config.neuron_config
        ranks = torch.arange(0, neuron_config.tp_degree, dtype=torch.int32)
        state_dict = rename(state_dict)
        for layer in range(config.num_hidden_layers):
            attention = f"layers.{layer}.self_attn"
            repeats = config.sharded_kv_heads // config.num_key_value_heads
            if repeats > 1:
                repeat_kv_heads(state_dict, attention, config.num_key_value_heads, repeats)
            stack_experts(
                state_dict, f"layers.{layer}.mlp", f"layers.{layer}.mlp.moe.expert_mlps.mlp_op", config.num_experts
            )
            state_dict[f"{attention}.rank_util.rank"] = ranks.clone()
            if neuron_config.fused_qkv:
                fuse_qkv(state_dict, attention)
        state_dict["rank_util.rank"] = ranks.clone()
        if neuron_config.vocab_parallel:
            state_dict["embed_tokens.rank_util.rank"] = torch.arange(0, neuron_config.local_ranks_size)
        return state_dict

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict):
        state_dict["lm_head.weight"] = state_dict["embed_tokens.weight"].clone()

    @classmethod
    def get_config_cls(cls):
        return Qwen2MoeInferenceConfig


def fuse_qkv(state_dict, attention):
    """Lay a layer's projections of queries, keys and values side by side, where one projection computes them."""
    for kind in ("weight", "bias"):
        names = [f"{attention}.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")]
        if names[0] in state_dict:
            state_dict[f"{attention}.Wqkv.{kind}"] = torch.cat([state_dict.pop(name) for name in names])


def rename(state_dict):
    """Give weights the names of the modules that use them here."""
    renamed = {}
    for name, weight in state_dict.items():
        if name.startswith("layers."):
            _, layer, inner = name.split(".", 2)
            module, _, kind = inner.rpartition(".")
            name = f"layers.{layer}.{RENAMED_IN_LAYER.get(module, module)}.{kind}"
        renamed[name] = weight
    return renamed


def repeat_kv_heads(state_dict, attention, kv_heads, repeats):
    """Give every query head a key and a value head of its own."""
    for name in (f"{attention}.{part}.{kind}" for part in ("k_proj", "v_proj") for kind in ("weight", "bias")):
        if name in state_dict:
            rows = state_dict[name]
            heads = rows.reshape(kv_heads, -1, *rows.shape[1:])
            state_dict[name] = heads.repeat_interleave(repeats, dim=0).reshape(-1, *rows.shape[1:])


def stack_experts(state_dict, block, target, n_experts):
    """One weight for all experts: (experts, input, output), the gate's outputs before the others."""

    def stacked(name):
        names = [f"{block}.experts.{expert}.{name}.weight" for expert in range(n_experts)]
        return torch.stack([state_dict.pop(name).t() for name in names])

    gate_up = torch.cat((stacked("gate_proj"), stacked("up_proj")), dim=-1)
    state_dict[f"{target}.gate_up_proj.weight"] = gate_up
    state_dict[f"{target}.down_proj.weight"] = stacked("down_proj").contiguous()
