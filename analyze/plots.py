"""Pictures of a comparison, written as PNG files: R by layer and component, error distributions, R by token.

Importing this module loads matplotlib.
"""

from .plotting.layers import plot_layers
from .plotting.qq import plot_qq
from .plotting.tokens import plot_tokens

__all__ = ["plot_layers", "plot_qq", "plot_tokens"]
