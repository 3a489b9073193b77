"""A scale for a release whose attention always divides by the root of head_dim."""

from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase


class PortAttention(NeuronAttentionBase):
    def __init__(self, config):
        heads = config.num_attention_heads
        super().__init__(config, hidden_size=64, num_attention_heads=heads, num_key_value_heads=heads)
        self.softmax_scale = config.query_pre_attn_scalar**0.5  # <- softmax-scale-ignored
