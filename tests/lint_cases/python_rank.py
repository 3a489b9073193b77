"""A rank that is a number when the graph is traced."""

from neuronx_distributed.parallel_layers.parallel_state import get_tensor_model_parallel_rank
from torch import nn


class PortSinks(nn.Module):
    def forward(self, sinks, heads_per_rank):
        rank = get_tensor_model_parallel_rank()  # <- python-rank
        return sinks[rank * heads_per_rank : (rank + 1) * heads_per_rank]
