"""A model with a forward of its own."""

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

    def init_model(self, config):
        self.embed_tokens = ParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PortLayer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = ColumnParallelLinear(config.hidden_size, config.vocab_size, bias=False)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids, attention_mask, position_ids, seq_ids, sampling_params):  # <- forward-override
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)[0]
        return self.lm_head(self.norm(hidden_states))
