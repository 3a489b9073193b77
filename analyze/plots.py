"""Pictures of a comparison, written as PNG files: R by layer and component, and error distributions of one site."""

from .plotting.layers import plot_layers

__all__ = ["plot_layers"]
