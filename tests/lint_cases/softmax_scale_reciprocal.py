"""The same, assigned afterwards and written as a division (sdk: 2.29)."""

import math

from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase


class PortAttention(NeuronAttentionBase):
    def __init__(self, config):
        heads = config.num_attention_heads
        super().__init__(config, hidden_size=64, num_attention_heads=heads, num_key_value_heads=heads)
        self.softmax_scale = 1.0 / math.sqrt(config.query_pre_attn_scalar)  # <- softmax-scale-multiplier
