"""Experts configured by a NeuronConfig that has no keys for them."""

from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig, NeuronConfig
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module


class PortInferenceConfig(InferenceConfig):
    def get_required_attributes(self):
        return ["hidden_size", "num_local_experts"]

    @classmethod
    def get_neuron_config_cls(cls):  # <- moe-without-config
        return NeuronConfig


def make_experts(config):
    return initialize_moe_module(config=config)
