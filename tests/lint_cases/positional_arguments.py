"""Attention takes everything but the configuration by keyword."""

from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase


class PortAttention(NeuronAttentionBase):
    def __init__(self, config):
        heads = config.num_attention_heads
        super().__init__(config, config.hidden_size, heads, num_key_value_heads=heads)  # <- too-many-arguments
