"""The base model calls self.norm."""

from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding
from torch import nn


class PortLayer(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None, None, None, None


class PortModel(NeuronBaseModel):
    def setup_attr_for_model(self, config):
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.buckets = config.neuron_config.buckets
        self.max_batch_size = config.neuron_config.max_batch_size

    def init_model(self, config):  # <- missing-model-part
        self.embed_tokens = ParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PortLayer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = ColumnParallelLinear(config.hidden_size, config.vocab_size, bias=False)
