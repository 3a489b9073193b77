"""A module that the release does not have."""

from neuronx_distributed_inference.modules.attention.sliding import SlidingAttention  # <- unknown-module
