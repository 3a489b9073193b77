"""A class of the port is called without an argument it requires."""

from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase


class PortAttention(NeuronAttentionBase):
    def __init__(self, config, layer_idx):
        heads = config.num_attention_heads
        super().__init__(config, hidden_size=64, num_attention_heads=heads, num_key_value_heads=heads)
        self.layer_idx = layer_idx


def make(config):
    return PortAttention(config)  # <- missing-argument
