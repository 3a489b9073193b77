"""An attribute of the neuron configuration that does not exist."""


def world_size(config):
    return config.neuron_config.tensor_parallel_size  # <- unknown-config-attribute
