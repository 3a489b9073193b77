"""A factor where the library wants a divisor (sdk: 2.29)."""

from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase


class PortAttention(NeuronAttentionBase):
    def __init__(self, config):
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            softmax_scale=config.head_dim**-0.5,  # <- softmax-scale-multiplier
        )
