"""How large R is, as a height and as a colour: the same bands in every picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap

#: Within the limit: blue (below), then two greys. Beyond it: yellow to black, monotonic in lightness.
_WITHIN = ("#B9D3E6", "#E9ECEE", "#CFD6DB")
_BEYOND = ("#FBD65B", "#F89A3C", "#E4572E", "#B5173B", "#6E0A4A", "#2A0634")
_STEPS = (1.0, 2.0, 8.0, 32.0, 256.0)
_TICKS = (1e-3, 0.01, 0.1, 0.25, 0.5, 0.8, 2.0, 4.0, 16.0, 100.0, 1e3, 1e4, 1e6, 1e8, 1e12, 1e20)


@dataclass(frozen=True)
class Scale:
    """A scale for R, or for relative L2 when there is no baseline.

    Attributes:
        quantity: its name.
        limit: largest value that passes.
        centre: value at height 0: 1 for R, the limit for relative L2.
        width: logarithm of the factor around the centre within which heights are logarithmic.
    """

    quantity: str
    limit: float
    centre: float
    width: float

    @classmethod
    def of(cls, quantity: str, limit: float) -> Scale:
        """The scale of a comparison."""
        if quantity == "R":
            return cls(quantity, limit, 1.0, math.log(max(limit, 1.05)))
        return cls(quantity, limit, limit, math.log(2.0))

    def height(self, value: float) -> float:
        """asinh(log(value / centre) / width): logarithmic near the limit, compressed far from it.

        Small exceedances stay visible below huge ones: at a limit of 1.2, R = 1, 1.2, 2, 1000 lie at 0, 0.9, 2, 4.3.
        """
        if value <= 0.0:
            return -math.inf
        return math.inf if math.isinf(value) else math.asinh(math.log(value / self.centre) / self.width)

    def ticks(self, low: float, high: float) -> tuple[list[float], list[str]]:
        """Heights and labels of ticks between two heights, no two of them touching."""
        candidates = [self.limit, self.centre]
        candidates += [tick if self.quantity == "R" else tick * self.limit for tick in _TICKS]
        taken: list[float] = []
        for value in candidates:
            height = self.height(value)
            if low <= height <= high and all(abs(height - other) > 0.055 * (high - low) for other in taken):
                taken.append(height)
        return taken, [f"{self.centre * math.exp(math.sinh(height) * self.width):.4g}" for height in taken]

    @cached_property
    def edges(self) -> list[float]:
        """Values at which the colour changes, the limit among them."""
        first = max(2.0, self.limit * 1.5) if self.quantity == "R" else 2.0 * self.limit
        below = (
            [1.0 / self.limit, math.sqrt(self.limit)]
            if self.quantity == "R" and self.limit > 1.0
            else [self.limit / 16.0, self.limit / 4.0]
        )
        return [*below, self.limit, *(first * step for step in _STEPS)]

    @property
    def colors(self) -> tuple[str, ...]:
        """One colour more than edges."""
        return _WITHIN + _BEYOND

    @cached_property
    def colormap(self) -> ListedColormap:
        """Colours of the bands."""
        return ListedColormap(list(self.colors))

    @cached_property
    def norm(self) -> BoundaryNorm:
        """Band numbers to colours."""
        return BoundaryNorm(np.arange(len(self.colors) + 1) - 0.5, len(self.colors))

    def band(self, value: float) -> int:
        """Number of the band of a value; the limit itself is beyond."""
        return int(np.searchsorted(self.edges, value, side="right"))
