"""A conversion without rank numbers."""

from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel


class PortForCausalLM(NeuronBaseForCausalLM):
    _model_cls = object

    @classmethod
    def get_config_cls(cls):
        return None

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):  # <- missing-rank
        state_dict["norm.weight"] = state_dict.pop("final_layernorm.weight")
        return state_dict
