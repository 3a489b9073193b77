"""A constructor keyword of an older library."""

from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase


class PortAttention(NeuronAttentionBase):
    def __init__(self, config):
        super().__init__(  # <- unknown-argument
            config=config,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            bias=True,
        )
