"""An attribute of the neuron configuration that only a newer release has."""


def dispatch(config):
    return config.neuron_config.enable_ve_data_parallel  # <- unknown-config-attribute
