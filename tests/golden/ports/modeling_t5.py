"""T5 for NxD Inference.

Ported from T5ForConditionalGeneration (transformers.models.t5.modeling_t5).
What the architecture is, and where every fact comes from, is in architecture.json beside this file.

Encoder and decoder are applications of their own. The decoder's is compiled twice: for the tokens that it begins with,
where it also keeps keys and values of what the encoder returned, and for one token after the other.
"""

import math
import os

import torch
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.application_base import NeuronApplicationBase
from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig
from neuronx_distributed_inference.models.model_wrapper import (
    CONTEXT_ENCODING_MODEL_TAG,
    TOKEN_GENERATION_MODEL_TAG,
    BaseModelInstance,
    ModelWrapper,
)
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config
from torch import nn
from transformers import T5ForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def get_rmsnorm_cls():
    """The device's kernel; on a CPU, where there is none, plain operators."""
    return LlamaRMSNorm if cpu_mode() else CustomRMSNorm


class T5NeuronConfig(NeuronConfig):
    """How the model runs on Neuron: `source_len` tokens of the source, `seq_len` tokens that are written.

    The first `max_context_length` of the latter are what the decoder can begin with.
    """

    def __init__(self, **kwargs):
        source_len = kwargs.pop("source_len", None)
        super().__init__(**kwargs)
        self.source_len = self.seq_len if source_len is None else source_len


class T5InferenceConfig(InferenceConfig):
    """The model's configuration, by the names it has in transformers."""

    def add_derived_config(self):
        self.num_cores_per_group = 1
        # ranks hold whole heads: heads of zeros fill up the last rank's
        tp_degree = self.neuron_config.tp_degree
        self.padded_heads = math.ceil(self.num_heads / tp_degree) * tp_degree

    def get_required_attributes(self):
        return [
            "d_ff",
            "d_kv",
            "dense_act_fn",
            "hidden_size",
            "layer_norm_epsilon",
            "num_decoder_layers",
            "num_heads",
            "num_layers",
            "pad_token_id",
            "relative_attention_max_distance",
            "relative_attention_num_buckets",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls):
        return T5NeuronConfig

    @classmethod
    def from_pretrained(cls, model_path, neuron_config=None, **kwargs):
        """Read a model folder's config.json."""
        neuron_config = neuron_config or cls.get_neuron_config_cls()()
        return cls(neuron_config, load_config=load_pretrained_config(model_path), **kwargs)


class NeuronT5RelativeBias(nn.Module):
    """A bias on scores by head and by bucket of the distance from query to key (Raffel et al., 2020)."""

    def __init__(self, config, bidirectional):
        super().__init__()
        self.table = ParallelEmbedding(
            config.relative_attention_num_buckets,
            config.padded_heads,
            dtype=config.neuron_config.torch_dtype,
            shard_across_embedding=True,
        )
        self.longest = max(config.neuron_config.seq_len, config.neuron_config.source_len)
        self.n_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional

    def forward(self, query_positions, n_keys):
        """The bias of this rank's heads, (batch or 1, heads, queries, keys)."""
        device = query_positions.device
        distance = torch.arange(n_keys, device=device) - query_positions.unsqueeze(-1)
        buckets = bucket_by_distance(self.longest, self.n_buckets, self.max_distance, self.bidirectional)
        bucket = torch.tensor(buckets, device=device)[distance + self.longest - 1]
        # the table's own forward would gather the heads of all ranks
        return nn.functional.embedding(bucket, self.table.weight).permute(0, 3, 1, 2)


def bucket_by_distance(longest, buckets, max_distance, bidirectional):
    """The bucket of every distance (key less query) from 1 - longest to longest - 1, as a list.

    They are counted on the CPU: elsewhere, a logarithm may be rounded across the edge of a bucket.
    """
    distance = torch.arange(1 - longest, longest, device="cpu")
    if bidirectional:
        buckets //= 2
        first, size = (distance > 0).long() * buckets, distance.abs()
    else:
        first, size = torch.zeros_like(distance), (-distance).clamp(min=0)
    exact = buckets // 2
    logarithm = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (buckets - exact)).long()).clamp(max=buckets - 1)
    return (first + torch.where(size < exact, size, far)).tolist()


class NeuronT5Attention(nn.Module):
    """T5Attention; ranks share out the heads. As it is, the encoder's."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.d_kv
        width = config.padded_heads * self.head_dim
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, width, bias=False, gather_output=False, dtype=config.neuron_config.torch_dtype
        )
        self.k_proj = ColumnParallelLinear(
            config.hidden_size, width, bias=False, gather_output=False, dtype=config.neuron_config.torch_dtype
        )
        self.v_proj = ColumnParallelLinear(
            config.hidden_size, width, bias=False, gather_output=False, dtype=config.neuron_config.torch_dtype
        )
        self.o_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            dtype=config.neuron_config.torch_dtype,
            reduce_dtype=config.neuron_config.rpl_reduce_dtype,
        )

    def heads(self, projected):
        """(batch, tokens, heads * head_dim) as (batch, heads, tokens, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query, key, value, mask, bias=None):
        """Mix values; `mask` is true where a query sees a key."""
        scores = torch.matmul(query, key.transpose(2, 3))
        if bias is not None:
            scores = scores + bias
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        return self.o_proj(torch.matmul(weights, value).transpose(1, 2).flatten(2))

    def forward(self, hidden_states, mask, bias):
        query, key, value = (self.heads(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.attend(query, key, value, mask, bias)


class NeuronT5SelfAttention(NeuronT5Attention):
    """The decoder's, over the tokens written so far."""

    def forward(self, hidden_states, position_ids, mask, bias, cached_key, cached_value):
        query, key, value = (self.heads(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        key, value = written(cached_key, position_ids, key), written(cached_value, position_ids, value)
        return self.attend(query, key, value, mask, bias), key, value


class NeuronT5CrossAttention(NeuronT5Attention):
    """The decoder's, over what the encoder returned."""

    def remember(self, encoder_hidden_states, cached_key, cached_value):
        """Keys and values for all tokens that will be written."""
        length = encoder_hidden_states.shape[1]
        positions = torch.arange(length, device=encoder_hidden_states.device).expand(cached_key.shape[0], length)
        key, value = (self.heads(p(encoder_hidden_states)) for p in (self.k_proj, self.v_proj))
        return written(cached_key, positions, key), written(cached_value, positions, value)

    def forward(self, hidden_states, source_mask, key, value):
        return self.attend(self.heads(self.q_proj(hidden_states)), key, value, source_mask)


def written(cache, positions, states):
    """A cache (batch, heads, length, head_dim) with states (batch, heads, n, head_dim) at positions (batch, n)."""
    index = positions.to(torch.int64)[:, None, :, None].expand_as(states)
    return torch.scatter(cache, 2, index, states)


class NeuronT5MLP(nn.Module):
    """T5DenseGatedActDense: wo(act(wi_0(x)) * wi_1(x))."""

    def __init__(self, config):
        super().__init__()
        self.act_fn = ACT2FN[config.dense_act_fn]
        self.wi_0 = ColumnParallelLinear(
            config.hidden_size,
            config.d_ff,
            bias=False,
            gather_output=False,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
        )
        self.wi_1 = ColumnParallelLinear(
            config.hidden_size,
            config.d_ff,
            bias=False,
            gather_output=False,
            dtype=config.neuron_config.torch_dtype,
            pad=True,
            sequence_parallel_enabled=config.neuron_config.sequence_parallel_enabled,
            sequence_dimension=1 if config.neuron_config.sequence_parallel_enabled else None,
        )
        self.wo = RowParallelLinear(
            config.d_ff,
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
        inner = self.act_fn(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        return self.wo(inner)


class NeuronT5EncoderLayer(nn.Module):
    """T5Block, as in the encoder."""

    def __init__(self, config):
        super().__init__()
        self.self_attn_norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = NeuronT5Attention(config)
        self.mlp_norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = NeuronT5MLP(config)

    def forward(self, hidden_states, mask, bias):
        after_self_attn_norm = self.self_attn_norm(hidden_states)
        after_self_attn = self.self_attn(after_self_attn_norm, mask, bias)
        residual = hidden_states + after_self_attn
        after_mlp_norm = self.mlp_norm(residual)
        after_mlp = self.mlp(after_mlp_norm)
        hidden_states = residual + after_mlp
        return hidden_states


class NeuronT5DecoderLayer(nn.Module):
    """T5Block, as in the decoder."""

    def __init__(self, config):
        super().__init__()
        self.self_attn_norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = NeuronT5SelfAttention(config)
        self.cross_attn_norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.cross_attn = NeuronT5CrossAttention(config)
        self.mlp_norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = NeuronT5MLP(config)

    def forward(self, hidden_states, position_ids, mask, bias, source_mask, self_cache, cross_cache):
        after_self_attn_norm = self.self_attn_norm(hidden_states)
        after_self_attn, *self_cache = self.self_attn(after_self_attn_norm, position_ids, mask, bias, *self_cache)
        residual = hidden_states + after_self_attn
        after_cross_attn_norm = self.cross_attn_norm(residual)
        after_cross_attn = self.cross_attn(after_cross_attn_norm, source_mask, *cross_cache)
        residual_2 = residual + after_cross_attn
        after_mlp_norm = self.mlp_norm(residual_2)
        after_mlp = self.mlp(after_mlp_norm)
        hidden_states = residual_2 + after_mlp
        return hidden_states, self_cache


class NeuronT5Encoder(nn.Module):
    """T5Stack that reads the source."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=config.neuron_config.torch_dtype,
            shard_across_embedding=True,
            pad=True,
        )
        self.layers = nn.ModuleList([NeuronT5EncoderLayer(config) for _ in range(config.num_layers)])
        self.norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.relative_bias = NeuronT5RelativeBias(config, bidirectional=True)

    def forward(self, input_ids, attention_mask):
        """Token ids and their mask, (batch, source_len), to (batch, source_len, hidden_size)."""
        hidden_states = self.embed_tokens(input_ids)
        mask = attention_mask[:, None, None, :].to(torch.bool)
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device).unsqueeze(0)
        bias = self.relative_bias(positions, length)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, bias)
        return self.norm(hidden_states)


class NeuronT5KVCacheManager(nn.Module):
    """By layer: keys and values of the tokens written so far, then of what the encoder returned."""

    def __init__(self, config):
        super().__init__()
        neuron_config = config.neuron_config
        heads = config.padded_heads // neuron_config.tp_degree
        self.past_key_values = nn.ParameterList()
        for _ in range(config.num_decoder_layers):
            for length in (neuron_config.seq_len, neuron_config.source_len):
                shape = (neuron_config.batch_size, heads, length, config.d_kv)
                for _ in ("key", "value"):
                    empty = torch.zeros(shape, dtype=neuron_config.torch_dtype)
                    self.past_key_values.append(nn.Parameter(empty, requires_grad=False))

    def layer(self, index):
        """The caches of a layer: of its self-attention, of its cross-attention."""
        first = 4 * index
        return list(self.past_key_values[first : first + 2]), list(self.past_key_values[first + 2 : first + 4])

    def keep(self, updated):
        """Take over what a forward pass returned; compiled, outputs overwrite the caches by themselves."""
        for cache, values in zip(self.past_key_values, updated, strict=True):
            cache.copy_(values)


class NeuronT5Decoder(nn.Module):
    """T5Stack that writes, and the projection to logits."""

    def __init__(self, config):
        super().__init__()
        self.seq_len = config.neuron_config.seq_len
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=config.neuron_config.torch_dtype,
            shard_across_embedding=True,
            pad=True,
        )
        self.layers = nn.ModuleList([NeuronT5DecoderLayer(config) for _ in range(config.num_decoder_layers)])
        self.norm = get_rmsnorm_cls()(config.hidden_size, eps=config.layer_norm_epsilon)
        self.relative_bias = NeuronT5RelativeBias(config, bidirectional=False)

        self.kv_mgr = NeuronT5KVCacheManager(config)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            pad=True,
            gather_output=True,
            dtype=config.neuron_config.torch_dtype,
        )

    def forward(self, input_ids, position_ids, last_token, source_mask, encoder_hidden_states):
        """Logits of one token per row, and the caches.

        Args:
            input_ids: (batch, n); several tokens begin at position 0, padded on the right.
            position_ids: where they stand, (batch, n).
            last_token: which of them logits are wanted of, (batch,).
            source_mask: (batch, source_len).
            encoder_hidden_states: (batch, source_len, hidden_size); empty where the caches hold it already.
        """
        hidden_states = self.embed_tokens(input_ids)
        keys = torch.arange(self.seq_len, device=input_ids.device)
        mask = keys[None, None, None, :] <= position_ids[:, None, :, None]
        source_mask = source_mask[:, None, None, :].to(torch.bool)
        bias = self.relative_bias(position_ids, self.seq_len)
        updated = []
        for index, layer in enumerate(self.layers):
            self_cache, cross_cache = self.kv_mgr.layer(index)
            if encoder_hidden_states.numel() > 0:
                cross_cache = layer.cross_attn.remember(encoder_hidden_states, *cross_cache)
            hidden_states, self_cache = layer(
                hidden_states, position_ids, mask, bias, source_mask, self_cache, cross_cache
            )
            updated += [*self_cache, *cross_cache]
        hidden_states = self.norm(hidden_states)
        index = last_token.to(torch.int64)[:, None, None].expand(-1, 1, hidden_states.shape[-1])
        hidden_states = torch.gather(hidden_states, 1, index)
        return self.lm_head(hidden_states).float(), *updated


#: Modules of the encoder around its layers: what they are called in the checkpoint, and here.
ENCODER_MODULES = {
    "shared": "embed_tokens",
    "encoder.final_layer_norm": "norm",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "relative_bias.table",
}
#: The same inside a layer.
ENCODER_LAYER = {
    "layer.0.layer_norm": "self_attn_norm",
    "layer.1.layer_norm": "mlp_norm",
    "layer.0.SelfAttention.q": "self_attn.q_proj",
    "layer.0.SelfAttention.k": "self_attn.k_proj",
    "layer.0.SelfAttention.v": "self_attn.v_proj",
    "layer.0.SelfAttention.o": "self_attn.o_proj",
    "layer.1.DenseReluDense.wi_0": "mlp.wi_0",
    "layer.1.DenseReluDense.wi_1": "mlp.wi_1",
    "layer.1.DenseReluDense.wo": "mlp.wo",
}
#: Modules of the decoder around its layers: what they are called in the checkpoint, and here.
DECODER_MODULES = {
    "shared": "embed_tokens",
    "decoder.final_layer_norm": "norm",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "relative_bias.table",
    "lm_head": "lm_head",
}
#: The same inside a layer.
DECODER_LAYER = {
    "layer.0.layer_norm": "self_attn_norm",
    "layer.1.layer_norm": "cross_attn_norm",
    "layer.2.layer_norm": "mlp_norm",
    "layer.0.SelfAttention.q": "self_attn.q_proj",
    "layer.0.SelfAttention.k": "self_attn.k_proj",
    "layer.0.SelfAttention.v": "self_attn.v_proj",
    "layer.0.SelfAttention.o": "self_attn.o_proj",
    "layer.1.EncDecAttention.q": "cross_attn.q_proj",
    "layer.1.EncDecAttention.k": "cross_attn.k_proj",
    "layer.1.EncDecAttention.v": "cross_attn.v_proj",
    "layer.1.EncDecAttention.o": "cross_attn.o_proj",
    "layer.2.DenseReluDense.wi_0": "mlp.wi_0",
    "layer.2.DenseReluDense.wi_1": "mlp.wi_1",
    "layer.2.DenseReluDense.wo": "mlp.wo",
}


def stack_state_dict(state_dict, config, layers, around, inside):
    """The weights of one stack by the names they have here, its heads padded to a multiple of the ranks.

    Args:
        state_dict: the whole checkpoint.
        config: the model's configuration.
        layers: what the checkpoint calls the list of layers.
        around: modules around them, by what the checkpoint calls them.
        inside: modules inside a layer.
    """
    converted = {}
    for name, weight in state_dict.items():
        module, _, kind = name.rpartition(".")
        if module in around:
            converted[f"{around[module]}.{kind}"] = weight
        elif module.startswith(f"{layers}."):
            layer, _, module = module[len(layers) + 1 :].partition(".")
            if module in inside:
                converted[f"layers.{layer}.{inside[module]}.{kind}"] = weight
    missing = config.padded_heads - config.num_heads
    return {name: with_heads(name, weight, missing, config.d_kv) for name, weight in converted.items()}


def with_heads(name, weight, missing, head_dim):
    """A weight with heads of zeros after its own."""
    module, kind = name.split(".")[-2:]
    if module in ("q_proj", "k_proj", "v_proj"):
        return nn.functional.pad(weight, (0, 0) * (weight.ndim - 1) + (0, missing * head_dim))
    if module == "o_proj" and kind == "weight":
        return nn.functional.pad(weight, (0, missing * head_dim))
    return nn.functional.pad(weight, (0, missing)) if module == "table" else weight


class T5Instance(BaseModelInstance):
    """One stack for the compiler, which lets outputs overwrite the caches."""

    def __init__(self, model_cls, config):
        self.model_cls = model_cls
        self.config = config
        self.module = None

    def load_module(self):
        self.module = self.model_cls(self.config).to(self.config.neuron_config.torch_dtype).eval()

    def get(self, bucket_rank, **kwargs):
        caches = self.module.kv_mgr.past_key_values if hasattr(self.module, "kv_mgr") else ()
        return self.module, {cache: output for output, cache in enumerate(caches, start=1)}


class ModelWrapperT5Encoder(ModelWrapper):
    """The encoder, for sources of one length."""

    def get_model_instance(self):
        return T5Instance(self.model_cls, self.config)

    def input_generator(self):
        shape = (self.neuron_config.batch_size, self.neuron_config.source_len)
        return [(torch.zeros(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.int32))]

    def forward(self, *args):
        return self.model(*args)


class ModelWrapperT5Decoder(ModelWrapper):
    """The decoder, for the tokens it begins with or for one."""

    def get_model_instance(self):
        return T5Instance(self.model_cls, self.config)

    def input_generator(self):
        batch, source_len = self.neuron_config.batch_size, self.neuron_config.source_len
        begins = self.tag == CONTEXT_ENCODING_MODEL_TAG
        length = self.neuron_config.max_context_length if begins else 1
        states = torch.empty(0)
        if begins:
            states = torch.zeros(batch, source_len, self.config.hidden_size, dtype=self.neuron_config.torch_dtype)
        tokens, last_token = torch.zeros(batch, length, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
        return [(tokens, tokens.clone(), last_token, torch.ones(batch, source_len, dtype=torch.int32), states)]

    def forward(self, *args):
        output = self.model(*args)
        if isinstance(self.model, NeuronT5Decoder):  # on a CPU: nothing overwrites the caches
            self.model.kv_mgr.keep(output[1:])
        return output if isinstance(output, torch.Tensor) else output[0]


class NeuronT5EncoderApplication(NeuronApplicationBase):
    """The encoder on Neuron."""

    _model_cls = NeuronT5Encoder

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoder_model = ModelWrapperT5Encoder(config=self.config, model_cls=self._model_cls, tag="encoder_model")
        self.models.append(self.encoder_model)

    def forward(self, input_ids, attention_mask):
        return self.encoder_model(input_ids, attention_mask)

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        return T5ForConditionalGeneration.from_pretrained(model_path, **kwargs)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        return stack_state_dict(state_dict, config, "encoder.block", ENCODER_MODULES, ENCODER_LAYER)

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict):
        """The encoder has no projection to logits."""

    @classmethod
    def get_config_cls(cls):
        return T5InferenceConfig


class NeuronT5DecoderApplication(NeuronApplicationBase):
    """The decoder on Neuron."""

    _model_cls = NeuronT5Decoder

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.context_encoding_model = ModelWrapperT5Decoder(
            config=self.config, model_cls=self._model_cls, tag=CONTEXT_ENCODING_MODEL_TAG
        )
        self.token_generation_model = ModelWrapperT5Decoder(
            config=self.config, model_cls=self._model_cls, tag=TOKEN_GENERATION_MODEL_TAG
        )
        self.models += [self.context_encoding_model, self.token_generation_model]

    def forward(self, input_ids, position_ids, last_token, source_mask, encoder_hidden_states):
        begins = encoder_hidden_states.numel() > 0
        model = self.context_encoding_model if begins else self.token_generation_model
        return model(input_ids, position_ids, last_token, source_mask, encoder_hidden_states)

    @staticmethod
    def load_hf_model(model_path, **kwargs):
        return T5ForConditionalGeneration.from_pretrained(model_path, **kwargs)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        return stack_state_dict(state_dict, config, "decoder.block", DECODER_MODULES, DECODER_LAYER)

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict):
        state_dict["lm_head.weight"] = state_dict["embed_tokens.weight"].clone()

    @classmethod
    def get_config_cls(cls):
        return T5InferenceConfig


class NeuronT5ForConditionalGeneration(nn.Module):
    """T5ForConditionalGeneration on Neuron."""

    _encoder_cls = NeuronT5EncoderApplication
    _decoder_cls = NeuronT5DecoderApplication

    def __init__(self, model_path, config=None, neuron_config=None):
        super().__init__()
        self.encoder = self._encoder_cls(model_path, config, neuron_config)
        self.decoder = self._decoder_cls(model_path, config, neuron_config)
        self.config = self.decoder.config
        self.source_mask = None

    @classmethod
    def get_config_cls(cls):
        return T5InferenceConfig

    def compile(self, compiled_model_path, **kwargs):
        for name in ("encoder", "decoder"):
            getattr(self, name).compile(os.path.join(compiled_model_path, name), **kwargs)

    def load(self, compiled_model_path, **kwargs):
        for name in ("encoder", "decoder"):
            getattr(self, name).load(os.path.join(compiled_model_path, name), **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        position_ids=None,
    ):
        """Logits of every row's last token, (batch, 1, vocab_size).

        With `input_ids`, a source is read and `decoder_input_ids` is what the decoder begins with; both may be padded
        on the right. Without, one token per row is written at its position.
        """
        neuron_config = self.config.neuron_config
        if input_ids is None:
            last_token = torch.zeros(decoder_input_ids.shape[0])
            return self.decode(decoder_input_ids, position_ids, last_token, torch.empty(0))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        self.source_mask = padded(attention_mask, neuron_config.source_len)
        encoder_hidden_states = self.encoder(padded(input_ids, neuron_config.source_len), self.source_mask)
        tokens = padded(decoder_input_ids, neuron_config.max_context_length)
        position_ids = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.decode(tokens, position_ids, decoder_attention_mask.sum(1) - 1, encoder_hidden_states)

    def decode(self, tokens, position_ids, last_token, encoder_hidden_states):
        tokens, position_ids, last_token = (value.to(torch.int32) for value in (tokens, position_ids, last_token))
        return self.decoder(tokens, position_ids, last_token, self.source_mask, encoder_hidden_states)

    def generate(self, input_ids, attention_mask=None, decoder_input_ids=None, max_new_tokens=20):
        """Continue greedily until every row has ended; returns what the decoder was given and wrote."""
        if decoder_input_ids is None:
            decoder_input_ids = torch.full((input_ids.shape[0], 1), self.config.decoder_start_token_id)
        written_ids = decoder_input_ids
        logits = self(input_ids, attention_mask, decoder_input_ids)
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            token = logits[:, -1].argmax(-1).masked_fill(ended, self.config.pad_token_id)
            written_ids = torch.cat([written_ids, token[:, None]], dim=1)
            ended = ended | (token == self.config.eos_token_id)
            length = written_ids.shape[1]
            if ended.all() or length == self.config.neuron_config.seq_len:
                break
            logits = self(decoder_input_ids=token[:, None], position_ids=torch.full((token.shape[0], 1), length - 1))
        return written_ids


def padded(ids, length):
    """Token ids, or a mask, with zeros up to a length."""
    return nn.functional.pad(ids, (0, length - ids.shape[1])).to(torch.int32)
