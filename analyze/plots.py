"""Pictures of a comparison, written as PNG files: R by layer and component, errors, R by token, maps, logits.

Importing this module loads matplotlib.
"""

from .plotting.histogram import plot_histogram
from .plotting.layers import plot_layers
from .plotting.logits import plot_logits
from .plotting.qq import plot_qq
from .plotting.tensor import plot_tensor
from .plotting.tokens import plot_tokens

__all__ = ["plot_histogram", "plot_layers", "plot_logits", "plot_qq", "plot_tensor", "plot_tokens"]
