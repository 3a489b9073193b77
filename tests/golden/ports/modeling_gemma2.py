"""Gemma2 for NxD Inference.

Ported from Gemma2ForCausalLM (transformers.models.gemma2.modeling_gemma2).
What the architecture is, and where every fact comes from, is in architecture.json beside this file.
"""

import torch
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding
from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig
from neuronx_distributed_inference.models.llama.modeling_llama import NeuronLlamaMLP
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.attention.attention_base import FlashAttentionStrategy, NeuronAttentionBase
from neuronx_distributed_inference.modules.attention.utils import RotaryEmbedding, repeat_kv
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
from torch import nn
from transformers import Gemma2ForCausalLM


class Gemma2RMSNorm(nn.Module):
    """RMS norm in FP32; the checkpoint stores the weight less one, rounded after the weight."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normalized * (1.0 + self.weight.float())).to(hidden_states.dtype)


class Gemma2NeuronConfig(NeuronConfig):
    """How the model runs on Neuron."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attn_cls = NeuronGemma2Attention


class Gemma2InferenceConfig(InferenceConfig):
    """The model's configuration, by the names it has in transformers."""

    def add_derived_config(self):
        self.num_cores_per_group = 1
        self.sharded_kv_heads = sharded_kv_heads(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.neuron_config.tp_degree,
        )
        self.hidden_act = self.hidden_activation

    def get_required_attributes(self):
        return [
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "head_dim",
            "hidden_activation",
            "hidden_size",
            "intermediate_size",
            "layer_types",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "pad_token_id",
            "query_pre_attn_scalar",
            "rms_norm_eps",
            "rope_theta",
            "sliding_window",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls):
        return Gemma2NeuronConfig

    @classmethod
    def from_pretrained(cls, model_path, neuron_config=None, **kwargs):
        """Read a model folder's config.json."""
        neuron_config = neuron_config or cls.get_neuron_config_cls()()
        return cls(neuron_config, load_config=load_pretrained_config(model_path), **kwargs)


def sharded_kv_heads(heads, kv_heads, tp_degree):
    """How many KV heads ranks share out: where neither number divides the other, one for every query head."""
    return kv_heads if kv_heads % tp_degree == 0 or tp_degree % kv_heads == 0 else heads


class NeuronGemma2Attention(NeuronAttentionBase):
    """Gemma2Attention."""

    def __init__(self, config, layer_idx):
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.sharded_kv_heads,
            head_dim=config.head_dim,
            rotary_emb=RotaryEmbedding(
                config.head_dim, max_position_embeddings=config.max_position_embeddings, base=config.rope_theta
            ),
            num_cores_per_group=config.num_cores_per_group,
        )
        self.local_size = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.softcap = config.attn_logit_softcapping
        self.query_factor = config.query_pre_attn_scalar**-0.5 * self.head_dim**0.5

    def prep_qkv_tensors(self, *args, **kwargs):
        """Queries carry the factor on scores: this release divides scores by the root of the head's size."""
        Q, *others = super().prep_qkv_tensors(*args, **kwargs)
        return (Q * self.query_factor, *others)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, **kwargs):
        """Attend within the layer's own mask; the cache holds all positions."""
        if self.local_size is not None:
            attention_mask = attention_mask & self.local_mask(attention_mask, position_ids, past_key_value)
        return super().forward(hidden_states, attention_mask, position_ids, past_key_value, **kwargs)

    def local_mask(self, attention_mask, position_ids, past_key_value):
        """Which keys a query may see, by position: (batch or 1, 1, queries, keys)."""
        keys = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
        if past_key_value is None:
            queries = torch.arange(attention_mask.shape[-2], device=attention_mask.device).reshape(1, 1, -1, 1)
        else:
            queries = position_ids[:, None, :, None]
        return queries - keys < self.local_size

    def get_flash_attention_strategy(self, q_len, has_attention_mask):
        """The kernels know no local mask and softcap."""
        return FlashAttentionStrategy.NONE

    def scaled_qk(self, Q, K, attention_mask):
        scores = torch.matmul(Q, K.transpose(2, 3)) / self.head_dim**0.5
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if attention_mask is not None:
            scores = torch.where(attention_mask.to(torch.bool), scores, torch.finfo(scores.dtype).min)
        return scores

    def compute_for_token_gen(
        self, Q, K, V, position_ids, past_key_value, attention_mask, active_mask, is_prefix_caching=False
    ):
        """Attend to the cache and the new token at once: the softcap precedes the softmax over both."""
        keys = torch.cat((past_key_value[0], K), dim=2)
        values = torch.cat((past_key_value[1], V), dim=2)
        new = torch.ones_like(attention_mask[..., :1]).expand(*attention_mask.shape[:-1], K.shape[2])
        scores = self.scaled_qk(Q, repeat_kv(keys, self.num_key_value_groups), torch.cat((attention_mask, new), dim=-1))
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(Q.dtype)
        return torch.matmul(weights, repeat_kv(values, self.num_key_value_groups))


class NeuronGemma2DecoderLayer(nn.Module):
    """Gemma2DecoderLayer: pre+post-normed blocks, sequential residual."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = NeuronGemma2Attention(config, layer_idx)
        self.post_attention_layernorm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = NeuronLlamaMLP(config)
        self.post_feedforward_layernorm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

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
        after_post_attention_layernorm = self.post_attention_layernorm(attention.hidden_states)
        residual = hidden_states + after_post_attention_layernorm
        after_pre_feedforward_layernorm = self.pre_feedforward_layernorm(residual)
        after_mlp = self.mlp(after_pre_feedforward_layernorm)[0]
        after_post_feedforward_layernorm = self.post_feedforward_layernorm(after_mlp)
        hidden_states = residual + after_post_feedforward_layernorm
        return hidden_states, attention.present_key_value, attention.cos_cache, attention.sin_cache, None


class NeuronGemma2LMHead(ColumnParallelLinear):
    """The projection to logits, bounded by a tanh."""

    def __init__(self, config, **kwargs):
        super().__init__(config.hidden_size, config.vocab_size, **kwargs)
        self.softcap = config.final_logit_softcapping

    def forward(self, hidden_states):
        logits = super().forward(hidden_states)
        return self.softcap * torch.tanh(logits / self.softcap)


class NeuronGemma2Model(NeuronBaseModel):
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
        self.layers = nn.ModuleList(
            [NeuronGemma2DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = NeuronGemma2LMHead(
            config,
            bias=False,
            pad=True,
            gather_output=not self.on_device_sampling,
            keep_padded_output=True,  # the base class masks the padding; narrowed, it would mask real tokens
            dtype=config.neuron_config.torch_dtype,
        )

    def get_model_output(self, input_ids=None, position_ids=None, inputs_embeds=None, **kwargs):
        """Token embeddings, scaled."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            factor = torch.tensor(self.config.hidden_size**0.5, dtype=inputs_embeds.dtype)
            inputs_embeds = inputs_embeds * factor
        return super().get_model_output(
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


class NeuronGemma2ForCausalLM(NeuronBaseForCausalLM):
    """Gemma2ForCausalLM on Neuron."""

    _model_cls = NeuronGemma2Model

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        return Gemma2ForCausalLM.from_pretrained(model_path, **kwargs)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        neuron_config = config.neuron_config
        ranks = torch.arange(0, neuron_config.tp_degree, dtype=torch.int32)
        for layer in range(config.num_hidden_layers):
            attention = f"layers.{layer}.self_attn"
            repeats = config.sharded_kv_heads // config.num_key_value_heads
            if repeats > 1:
                repeat_kv_heads(state_dict, attention, config.num_key_value_heads, repeats)
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
        return Gemma2InferenceConfig


def fuse_qkv(state_dict, attention):
    """Lay a layer's projections of queries, keys and values side by side, where one projection computes them."""
    for kind in ("weight", "bias"):
        names = [f"{attention}.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")]
        if names[0] in state_dict:
            state_dict[f"{attention}.Wqkv.{kind}"] = torch.cat([state_dict.pop(name) for name in names])


def repeat_kv_heads(state_dict, attention, kv_heads, repeats):
    """Give every query head a key and a value head of its own."""
    for name in (f"{attention}.{part}.{kind}" for part in ("k_proj", "v_proj") for kind in ("weight", "bias")):
        if name in state_dict:
            rows = state_dict[name]
            heads = rows.reshape(kv_heads, -1, *rows.shape[1:])
            state_dict[name] = heads.repeat_interleave(repeats, dim=0).reshape(-1, *rows.shape[1:])
