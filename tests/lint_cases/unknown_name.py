"""A name from the wrong module."""

from neuronx_distributed_inference.models.model_base import convert_state_dict_to_fused_qkv  # <- unknown-name
