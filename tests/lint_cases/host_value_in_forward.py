"""The longest position of the first input, for every input."""

from torch import nn


class PortRotaryEmbedding(nn.Module):
    def forward(self, hidden_states, position_ids):
        length = position_ids.max().item()  # <- host-value-in-forward
        return hidden_states[:, :length]
