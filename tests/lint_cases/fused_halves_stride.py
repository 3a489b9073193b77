"""Gate and up in one projection that is split after sharding."""

import torch.nn.functional as F
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, SPMDRank
from torch import nn


class PortMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = ColumnParallelLinear(  # <- fused-halves-stride
            config.hidden_size, 2 * config.intermediate_size, bias=False, gather_output=False
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, input_is_parallel=True)

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
