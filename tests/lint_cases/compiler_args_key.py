"""Compiler arguments that never reach the compiler."""

from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig, NeuronConfig

config = NeuronConfig(
    tp_degree=2,
    seq_len=128,
    compiler_args="--model-type=transformer -O1",  # <- compiler-args-key
)
