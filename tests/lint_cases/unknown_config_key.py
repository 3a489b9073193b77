"""A key of NeuronConfig that is spelled as another library spells it."""

from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig, NeuronConfig

options = {
    "tp_degree": 2,
    "sequence_length": 128,  # <- unknown-config-key
}
config = NeuronConfig(**options)
