"""Keys are asked for with a prefix that they no longer have."""

import torch
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel


class PortForCausalLM(NeuronBaseForCausalLM):
    _model_cls = object

    @classmethod
    def get_config_cls(cls):
        return None

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        state_dict["rank_util.rank"] = torch.arange(0, config.neuron_config.tp_degree, dtype=torch.int32)
        for layer in range(config.num_hidden_layers):
            norm = state_dict[f"model.layers.{layer}.ln_1.weight"]  # <- prefix-already-stripped
            state_dict[f"layers.{layer}.input_layernorm.weight"] = norm
        return state_dict
