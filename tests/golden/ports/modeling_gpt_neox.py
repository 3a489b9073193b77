"""GPTNeoX for NxD Inference.

Ported from GPTNeoXForCausalLM (transformers.models.gpt_neox.modeling_gpt_neox).
What the architecture is, and where every fact comes from, is in architecture.json beside this file.
"""

import torch
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase
from neuronx_distributed_inference.modules.attention.utils import RotaryEmbedding, apply_rotary_pos_emb
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
from torch import nn
from transformers import GPTNeoXForCausalLM
from transformers.activations import ACT2FN


class GPTNeoXNeuronConfig(NeuronConfig):
    """How the model runs on Neuron."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attn_cls = NeuronGPTNeoXAttention


class GPTNeoXInferenceConfig(InferenceConfig):
    """The model's configuration, by the names it has in transformers."""

    def add_derived_config(self):
        self.num_cores_per_group = 1

    def get_required_attributes(self):
        return [
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "layer_norm_eps",
            "num_attention_heads",
            "num_hidden_layers",
            "pad_token_id",
            "partial_rotary_factor",
            "rope_theta",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls):
        return GPTNeoXNeuronConfig

    @classmethod
    def from_pretrained(cls, model_path, neuron_config=None, **kwargs):
        """Read a model folder's config.json."""
        neuron_config = neuron_config or cls.get_neuron_config_cls()()
        return cls(neuron_config, load_config=load_pretrained_config(model_path), **kwargs)


class NeuronGPTNeoXAttention(NeuronAttentionBase):
    """GPTNeoXAttention."""

    def __init__(self, config):
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            rotary_emb=RotaryEmbedding(
                int((config.hidden_size // config.num_attention_heads) * config.partial_rotary_factor),
                max_position_embeddings=config.max_position_embeddings,
                base=config.rope_theta,
            ),
            num_cores_per_group=config.num_cores_per_group,
            qkv_bias=True,
            o_bias=True,
        )

    def apply_rotary_embedding(self, Q, K, V, position_ids, cos_cache, sin_cache, use_polar_compatible_rope):
        if self.rotary_emb is None:
            return Q, K, cos_cache, sin_cache
        if cos_cache is None or sin_cache is None:
            cos_cache, sin_cache = self.rotary_emb(V, position_ids)
        dim = self.rotary_emb.dim
        rotated_Q, rotated_K = apply_rotary_pos_emb(Q[..., :dim], K[..., :dim], cos_cache, sin_cache)
        Q = torch.cat((rotated_Q, Q[..., dim:]), dim=-1)
        K = torch.cat((rotated_K, K[..., dim:]), dim=-1)
        return Q, K, cos_cache, sin_cache


class NeuronGPTNeoXMLP(nn.Module):
    """GPTNeoXMLP: dense_4h_to_h(act(dense_h_to_4h(x)))."""

    def __init__(self, config):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.dense_h_to_4h = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=True,
            gather_output=False,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
        )
        self.dense_4h_to_h = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=True,
            input_is_parallel=True,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
            reduce_dtype=config.neuron_config.rpl_reduce_dtype,
        )

    def forward(self, hidden_states):
        inner = self.act_fn(self.dense_h_to_4h(hidden_states))
        return self.dense_4h_to_h(inner)


class NeuronGPTNeoXDecoderLayer(nn.Module):
    """GPTNeoXLayer: pre-normed blocks, parallel residual."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = NeuronGPTNeoXAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = NeuronGPTNeoXMLP(config)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        **kwargs,
    ):
        after_input_layernorm = self.input_layernorm(hidden_states)
        attention = self.attention(
            after_input_layernorm,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            **kwargs,
        )
        after_post_attention_layernorm = self.post_attention_layernorm(hidden_states)
        after_mlp = self.mlp(after_post_attention_layernorm)
        hidden_states = hidden_states + attention.hidden_states + after_mlp
        return hidden_states, attention.present_key_value, attention.cos_cache, attention.sin_cache, None


class NeuronGPTNeoXModel(NeuronBaseModel):
    """Embedding, layers, final norm and the projection to logits."""

    def setup_attr_for_model(self, config):
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_attention_heads
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
        self.layers = nn.ModuleList([NeuronGPTNeoXDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            pad=True,
            gather_output=not self.on_device_sampling,
            keep_padded_output=True,  # the base class masks the padding; narrowed, it would mask real tokens
            dtype=config.neuron_config.torch_dtype,
        )


#: Modules that are called otherwise here, and what they are called in the checkpoint.
RENAMED = {
    "embed_in": "embed_tokens",
    "final_layer_norm": "norm",
    "embed_out": "lm_head",
}


#: The same inside a layer.
RENAMED_IN_LAYER = {
    "attention.dense": "attention.o_proj",
}


class NeuronGPTNeoXForCausalLM(NeuronBaseForCausalLM):
    """GPTNeoXForCausalLM on Neuron."""

    _model_cls = NeuronGPTNeoXModel
    _STATE_DICT_MODEL_PREFIX = "gpt_neox."

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        return GPTNeoXForCausalLM.from_pretrained(model_path, **kwargs)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        neuron_config = config.neuron_config
        ranks = torch.arange(0, neuron_config.tp_degree, dtype=torch.int32)
        state_dict = rename(state_dict)
        for layer in range(config.num_hidden_layers):
            attention = f"layers.{layer}.attention"
            split_qkv(state_dict, attention, config)
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
        return GPTNeoXInferenceConfig


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
        for old, new in RENAMED.items():
            if name.startswith(f"{old}."):
                name = f"{new}.{name.removeprefix(old)[1:]}"
                break
        if name.startswith("layers."):
            _, layer, inner = name.split(".", 2)
            module, _, kind = inner.rpartition(".")
            name = f"layers.{layer}.{RENAMED_IN_LAYER.get(module, module)}.{kind}"
        renamed[name] = weight
    return renamed


def split_qkv(state_dict, attention, config):
    """One projection has, for every KV head, the rows of its queries, its key and its value."""
    head_dim = config.hidden_size // config.num_attention_heads
    for kind in ("weight", "bias"):
        name = f"{attention}.query_key_value.{kind}"
        if name not in state_dict:
            continue
        rows = state_dict.pop(name)
        groups = rows.reshape(config.num_attention_heads, -1, head_dim, *rows.shape[1:])
        query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
        for projection, part in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
            state_dict[f"{attention}.{projection}.{kind}"] = part.reshape(-1, *rows.shape[1:]).clone()
