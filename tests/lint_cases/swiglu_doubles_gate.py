"""SwiGLU of gpt-oss with the activation of everybody else."""

from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig, NeuronConfig

config = MoENeuronConfig(
    tp_degree=2,
    seq_len=128,
    glu_mlp=True,
    glu_type="swiglu",  # <- swiglu-doubles-gate
)
