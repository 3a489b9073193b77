"""The library that NxD Inference replaced."""

from transformers_neuronx import LlamaForSampling  # <- deprecated-library
