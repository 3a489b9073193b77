"""A causal model that names no configuration class."""

from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel


class PortForCausalLM(NeuronBaseForCausalLM):  # <- missing-config-class
    _model_cls = object
