"""DeepseekV3 for NxD Inference.

Ported from DeepseekV3ForCausalLM (transformers.models.deepseek_v3.modeling_deepseek_v3).
What the architecture is, and where every fact comes from, is in architecture.json beside this file.
"""

import copy
import math

import torch
from neuronx_distributed.modules.moe.routing import RouterTopK
from neuronx_distributed.parallel_layers.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    SPMDRank,
)
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig
from neuronx_distributed_inference.models.llama.modeling_llama import NeuronLlamaMLP
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBaseOutput
from neuronx_distributed_inference.modules.attention.utils import RotaryEmbedding, manual_softmax
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
from torch import nn
from transformers import DeepseekV3ForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def get_rmsnorm_cls():
    """The device's kernel; on a CPU, where there is none, plain operators."""
    return LlamaRMSNorm if cpu_mode() else CustomRMSNorm


class DeepseekV3NeuronConfig(MoENeuronConfig):
    """How the model runs on Neuron."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attn_cls = NeuronDeepseekV3Attention


class DeepseekV3InferenceConfig(InferenceConfig):
    """The model's configuration, by the names it has in transformers."""

    def add_derived_config(self):
        self.num_cores_per_group = 1
        # the cache holds latents: one head for all, as wide as the latent
        self.head_dim = self.kv_lora_rank

    def get_required_attributes(self):
        return [
            "first_k_dense_replace",
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "kv_lora_rank",
            "moe_intermediate_size",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "num_attention_heads",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_key_value_heads",
            "pad_token_id",
            "q_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "rms_norm_eps",
            "rope_scaling",
            "rope_theta",
            "routed_scaling_factor",
            "topk_group",
            "v_head_dim",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls):
        return DeepseekV3NeuronConfig

    @classmethod
    def from_pretrained(cls, model_path, neuron_config=None, **kwargs):
        """Read a model folder's config.json."""
        neuron_config = neuron_config or cls.get_neuron_config_cls()()
        return cls(neuron_config, load_config=load_pretrained_config(model_path), **kwargs)


class DeepseekV3YarnRotaryEmbedding(RotaryEmbedding):
    """YaRN: slow pairs are interpolated, fast ones kept, cosine and sine scaled (Peng et al., 2023)."""

    def __init__(self, dim, max_position_embeddings, base, scaling):
        super().__init__(dim, max_position_embeddings, base)
        self.scaling = scaling

    def get_inv_freqs(self, device=None):
        rates = super().get_inv_freqs(device)
        original = self.scaling.get("original_max_position_embeddings") or self.max_position_embeddings

        def pair_that_turns(times):
            return self.dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(self.base))

        low = pair_that_turns(self.scaling.get("beta_fast") or 32)
        high = pair_that_turns(self.scaling.get("beta_slow") or 1)
        if self.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        high += 0.001 if low == high else 0
        pairs = torch.arange(self.dim // 2, dtype=torch.float, device=device)
        interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
        return rates * (interpolated / self.scaling["factor"] + 1 - interpolated)

    def get_factor(self):
        if self.scaling.get("attention_factor") is not None:
            return self.scaling["attention_factor"]
        one, all_dims = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        return self._factor(one) / self._factor(all_dims) if one and all_dims else self._factor(1.0)

    def _factor(self, weight):
        factor = self.scaling["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    def forward(self, x, position_ids):
        cos, sin = super().forward(x.float(), position_ids)
        return (cos * self.get_factor()).to(x.dtype), (sin * self.get_factor()).to(x.dtype)


def rotate_interleaved(x, cos, sin):
    """Rotate the pairs (2i, 2i + 1) of the last axis; cos and sin hold every pair's value once in each half."""
    pairs = x.shape[-1] // 2
    cos, sin = cos[..., :pairs].unsqueeze(1), sin[..., :pairs].unsqueeze(1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class NeuronDeepseekV3Attention(nn.Module):
    """DeepseekV3Attention: keys and values through a latent, which is what the cache holds.

    Prefill expands the latent to keys and values of every head; a decode step leaves the cache as it is and takes the
    expansion to the other side of the products instead.
    """

    def __init__(self, config):
        super().__init__()
        self.torch_dtype = config.neuron_config.torch_dtype
        self.tp_degree = config.neuron_config.tp_degree
        self.rank_util = SPMDRank(world_size=self.tp_degree)
        if config.num_attention_heads % self.tp_degree:
            raise ValueError("latent attention needs a number of heads that the ranks divide")
        self.num_heads = config.num_attention_heads // self.tp_degree
        self.plain_dim = config.qk_nope_head_dim
        self.rotated_dim = config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.rank = config.kv_lora_rank
        self.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * (
            0.1 * config.rope_scaling["mscale_all_dim"] * math.log(config.rope_scaling["factor"]) + 1
        ) ** 2
        self.rotary_emb = DeepseekV3YarnRotaryEmbedding(
            config.qk_rope_head_dim, config.max_position_embeddings, config.rope_theta, config.rope_scaling
        )
        linear = {"dtype": self.torch_dtype}
        sharded = {"bias": False, "gather_output": False, "dtype": self.torch_dtype}
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False, **linear)
        self.q_a_layernorm = get_rmsnorm_cls()(config.q_lora_rank, eps=1e-06)
        self.q_b_proj = ColumnParallelLinear(
            config.q_lora_rank,
            config.num_attention_heads * (self.plain_dim + self.rotated_dim),
            **sharded,
        )
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rotated_dim, bias=False, **linear)
        self.kv_a_layernorm = get_rmsnorm_cls()(config.kv_lora_rank, eps=1e-06)
        self.kv_b_proj = ColumnParallelLinear(
            self.rank,
            config.num_attention_heads * (self.plain_dim + self.value_dim),
            **sharded,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.value_dim,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            dtype=self.torch_dtype,
            reduce_dtype=config.neuron_config.rpl_reduce_dtype,
        )

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        cos_cache=None,
        sin_cache=None,
        **kwargs,
    ):
        batch, length, _ = hidden_states.shape
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        queries = queries.view(batch, length, self.num_heads, -1).transpose(1, 2)
        query_plain, query_rotated = queries.split((self.plain_dim, self.rotated_dim), dim=-1)
        latent, key_rotated = self.kv_a_proj_with_mqa(hidden_states).split((self.rank, self.rotated_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)
        key_rotated = key_rotated.unsqueeze(1)
        if cos_cache is None or sin_cache is None:
            cos_cache, sin_cache = self.rotary_emb(latent, position_ids)
        query_rotated = rotate_interleaved(query_rotated, cos_cache, sin_cache)
        key_rotated = rotate_interleaved(key_rotated, cos_cache, sin_cache)
        expanded = self.kv_b_proj(latent).view(batch, length, self.num_heads, -1).transpose(1, 2)
        key_plain, values = expanded.split((self.plain_dim, self.value_dim), dim=-1)
        scores = torch.matmul(query_plain, key_plain.transpose(2, 3))
        scores = (scores + torch.matmul(query_rotated, key_rotated.transpose(2, 3))) * self.scale
        if past_key_value is None:
            scores = torch.where(attention_mask.to(torch.bool), scores, torch.finfo(scores.dtype).min)
            weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
            mixed = torch.matmul(weights, values)
        else:
            mixed = self.attend_to_cache(query_plain, query_rotated, scores, values, past_key_value, attention_mask)
        output = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        padding = self.rank - self.rotated_dim
        cached = (nn.functional.pad(key_rotated, (0, padding)), latent.unsqueeze(1))
        return NeuronAttentionBaseOutput(output, cached, cos_cache, sin_cache)

    def attend_to_cache(self, query_plain, query_rotated, scores, values, past_key_value, attention_mask):
        """Softmax over the cache and the new token, the expansion applied to queries and to what is mixed."""
        key_rotated, latent = past_key_value[0][..., : self.rotated_dim], past_key_value[1]
        expansion = self.kv_b_proj.weight.view(self.num_heads, self.plain_dim + self.value_dim, self.rank)
        key_expansion, value_expansion = expansion.split((self.plain_dim, self.value_dim), dim=1)
        latent_queries = torch.einsum("bhqd,hdr->bhqr", query_plain, key_expansion)
        prior = torch.matmul(latent_queries, latent.transpose(2, 3))
        prior = (prior + torch.matmul(query_rotated, key_rotated.transpose(2, 3))) * self.scale
        prior = torch.where(attention_mask.to(torch.bool), prior, torch.finfo(prior.dtype).min)
        prior_weights, weights = manual_softmax(prior.float(), scores.float(), is_speculation=False)
        from_cache = torch.matmul(prior_weights.to(latent.dtype), latent)
        from_cache = torch.einsum("bhqr,hdr->bhqd", from_cache, value_expansion)
        return from_cache + torch.matmul(weights.to(values.dtype), values)


class NeuronDeepseekV3SharedExpert(nn.Module):
    """DeepseekV3MLP: down_proj(act(gate_proj(x)) * up_proj(x))."""

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


class NeuronDeepseekV3Router(RouterTopK):
    """The best experts by their sigmoid, plus a correction that does not weigh, among the best groups."""

    def __init__(self, config):
        super().__init__(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            dtype=config.neuron_config.router_config.dtype,
            bias=False,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1,
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.n_groups = config.n_group
        self.n_open_groups = config.topk_group

    def forward(self, hidden_states):
        router_logits = self.get_router_logits(hidden_states)
        scores = torch.sigmoid(router_logits.float())
        ranked = scores + self.e_score_correction_bias.float()
        ranked = ranked.masked_fill(~self.open_experts(ranked), 0.0)
        _, expert_index = torch.topk(ranked, self.top_k, dim=-1)
        return router_logits, scores.to(hidden_states.dtype), expert_index

    def open_experts(self, ranked):
        """Which experts belong to one of the best groups: (tokens, experts)."""
        by_group = ranked.unflatten(-1, (self.n_groups, -1))
        best = by_group.topk(2, dim=-1)[0].sum(dim=-1)
        _, index = torch.topk(best, self.n_open_groups, dim=-1)
        mask = torch.zeros_like(best).scatter(1, index, 1.0).bool()
        return mask.unsqueeze(-1).expand_as(by_group).flatten(1)


def experts_config(config):
    """The configuration as the library's experts read it."""
    found = copy.deepcopy(config)
    found.num_local_experts = config.n_routed_experts
    found.intermediate_size = config.moe_intermediate_size
    found.n_shared_experts = 0
    found.neuron_config.router_config.dtype = torch.float32
    found.neuron_config.normalize_top_k_affinities = True
    return found


class NeuronDeepseekV3MoE(nn.Module):
    """DeepseekV3MoE: routed experts and a block that every token passes."""

    def __init__(self, config):
        super().__init__()
        self.moe = initialize_moe_module(config=experts_config(config))
        self.moe.router = NeuronDeepseekV3Router(config)
        self.scale = config.routed_scaling_factor
        self.shared_experts = NeuronDeepseekV3SharedExpert(
            config, config.moe_intermediate_size * config.n_shared_experts
        )

    def forward(self, hidden_states, padding_mask=None):
        routed = self.moe(hidden_states, padding_mask)[0]
        routed = routed * self.scale
        shared = self.shared_experts(hidden_states)
        return (routed + shared,)


class NeuronDeepseekV3DecoderLayer(nn.Module):
    """DeepseekV3DecoderLayer: pre-normed blocks, sequential residual."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = NeuronDeepseekV3Attention(config)
        self.post_attention_layernorm = get_rmsnorm_cls()(config.hidden_size, eps=config.rms_norm_eps)
        if layer_idx < config.first_k_dense_replace:
            self.mlp = NeuronLlamaMLP(config)
        else:
            self.mlp = NeuronDeepseekV3MoE(config)

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
        after_mlp = self.mlp(after_post_attention_layernorm)[0]
        hidden_states = residual + after_mlp
        return hidden_states, attention.present_key_value, attention.cos_cache, attention.sin_cache, None


class NeuronDeepseekV3Model(NeuronBaseModel):
    """Embedding, layers, final norm and the projection to logits."""

    def setup_attr_for_model(self, config):
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = 1
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
            [NeuronDeepseekV3DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
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


class NeuronDeepseekV3ForCausalLM(NeuronBaseForCausalLM):
    """DeepseekV3ForCausalLM on Neuron."""

    _model_cls = NeuronDeepseekV3Model

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        return DeepseekV3ForCausalLM.from_pretrained(model_path, **kwargs)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        neuron_config = config.neuron_config
        ranks = torch.arange(0, neuron_config.tp_degree, dtype=torch.int32)
        state_dict = rename(state_dict)
        for layer in range(config.num_hidden_layers):
            attention = f"layers.{layer}.self_attn"
            if f"layers.{layer}.mlp.moe.router.linear_router.weight" in state_dict:
                stack_experts(
                    state_dict,
                    f"layers.{layer}.mlp",
                    f"layers.{layer}.mlp.moe.expert_mlps.mlp_op",
                    config.n_routed_experts,
                )
                state_dict[f"layers.{layer}.mlp.moe.router.e_score_correction_bias"] = state_dict.pop(
                    f"layers.{layer}.mlp.moe.router.linear_router.e_score_correction_bias"
                )
            state_dict[f"{attention}.rank_util.rank"] = ranks.clone()
        state_dict["rank_util.rank"] = ranks.clone()
        if neuron_config.vocab_parallel:
            state_dict["embed_tokens.rank_util.rank"] = torch.arange(0, neuron_config.local_ranks_size)
        return state_dict

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict):
        state_dict["lm_head.weight"] = state_dict["embed_tokens.weight"].clone()

    @classmethod
    def get_config_cls(cls):
        return DeepseekV3InferenceConfig


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


def stack_experts(state_dict, block, target, n_experts):
    """One weight for all experts: (experts, input, output), the gate's outputs before the others."""

    def stacked(name):
        names = [f"{block}.experts.{expert}.{name}.weight" for expert in range(n_experts)]
        return torch.stack([state_dict.pop(name).t() for name in names])

    gate_up = torch.cat((stacked("gate_proj"), stacked("up_proj")), dim=-1)
    state_dict[f"{target}.gate_up_proj.weight"] = gate_up
    state_dict[f"{target}.down_proj.weight"] = stacked("down_proj").contiguous()
