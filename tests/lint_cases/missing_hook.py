"""A model that does not say what it is made of."""

from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel


class PortModel(NeuronBaseModel):  # <- missing-hook
    def setup_attr_for_model(self, config):
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.tp_degree = config.neuron_config.tp_degree
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.max_batch_size = config.neuron_config.max_batch_size
        self.buckets = config.neuron_config.buckets
