"""A rank from the environment of the process that traces."""

import os

from torch import nn


class PortEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rank = int(os.environ["RANK"])  # <- python-rank
