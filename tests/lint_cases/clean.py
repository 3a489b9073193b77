"""A whole port with nothing wrong: what the linter must be silent about."""

import torch
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase
from neuronx_distributed_inference.modules.attention.utils import RotaryEmbedding
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def get_rmsnorm_cls():
    return LlamaRMSNorm if cpu_mode() else CustomRMSNorm


class PortInferenceConfig(InferenceConfig):
    def add_derived_config(self):
        self.num_cores_per_group = 1

    def get_required_attributes(self):
        return ["hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size"]

    @classmethod
    def get_neuron_config_cls(cls):
        return NeuronConfig


class PortAttention(NeuronAttentionBase):
    def __init__(self, config):
        head_dim = config.hidden_size // config.num_attention_heads
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary_emb=RotaryEmbedding(head_dim, config.max_position_embeddings, config.rope_theta),
            sliding_window=config.sliding_window,
        )

    def prep_qkv_tensors(self, position_ids, hidden_states, past_key_value, **kwargs):
        return super().prep_qkv_tensors(position_ids, hidden_states, past_key_value, **kwargs)


class PortMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        dtype = config.neuron_config.torch_dtype
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size, 2 * config.intermediate_size, bias=False, gather_output=False, stride=2, dtype=dtype
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, input_is_parallel=True, dtype=dtype
        )

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class PortDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = PortAttention(config)
        self.mlp = PortMLP(config)
        self.input_layernorm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, **kwargs):
        residual = hidden_states
        attention = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            **kwargs,
        )
        hidden_states = residual + attention.hidden_states
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, attention.present_key_value, attention.cos_cache, attention.sin_cache, None


class PortModel(NeuronBaseModel):
    def setup_attr_for_model(self, config):
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.max_batch_size = config.neuron_config.max_batch_size
        self.buckets = config.neuron_config.buckets
        self.sliding_window = config.sliding_window

    def init_model(self, config):
        dtype = config.neuron_config.torch_dtype
        self.embed_tokens = ParallelEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id, dtype=dtype)
        self.layers = nn.ModuleList([PortDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)


class PortForCausalLM(NeuronBaseForCausalLM):
    _model_cls = PortModel

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model_path, **kwargs)

    @classmethod
    def get_config_cls(cls):
        return PortInferenceConfig

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        ranks = torch.arange(0, config.neuron_config.tp_degree, dtype=torch.int32)
        for layer in range(config.num_hidden_layers):
            state_dict[f"layers.{layer}.self_attn.rank_util.rank"] = ranks.clone()
        state_dict["rank_util.rank"] = ranks.clone()
        return state_dict

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict):
        state_dict["lm_head.weight"] = state_dict["embed_tokens.weight"].clone()
