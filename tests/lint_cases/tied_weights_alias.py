"""The head is the embedding, not a copy of it."""

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
        return state_dict

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict):
        state_dict["lm_head.weight"] = state_dict["embed_tokens.weight"]  # <- tied-weights-alias
