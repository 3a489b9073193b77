"""Random inputs of the right shape and scale: a component test that depends on no captured values.

Every module's first argument is drawn from a normal distribution with the mean and standard deviation, feature by
feature, of what the reference's module gets in its place. The draw depends on the seed, module, call and prompt only:
the reference in either precision and the target see the same numbers, each rounded to its own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash

from ...analyze.sites import Site
from ..layout import StepLayout, cut
from .values import Given, position_axis

#: What stands for the site that random values come from.
RANDOM = "random values"
_SEED_BITS = (1 << 63) - 1


class RandomInputs:
    """Random values for the first argument of every module."""

    def __init__(self, seed: int) -> None:
        """Draw from `seed`; the first model that is run sets the scale of each input."""
        self._seed = seed
        self._names: Mapping[str, str] = {}
        self._scales: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def known_as(self, names: Mapping[str, str]) -> RandomInputs:
        """The same values for a model whose modules have other names: from its paths to the reference's."""
        other = RandomInputs(self._seed)
        other._names, other._scales = names, self._scales
        return other

    def output(self, site: Site, own: torch.Tensor, layout: StepLayout) -> Given | None:
        """Outputs stay what they are."""
        return None

    def input(self, site: Site, own: torch.Tensor, layout: StepLayout, *, main: bool) -> Given | None:
        """See `ValueSource`."""
        if not main or not own.is_floating_point():
            return None
        key = self._names.get(site.module, site.module), site.call
        placed = own.clone()
        for part in cut(placed, layout, last_only=False):
            if part.position_start is None:
                return None
            rows = part.values.movedim(position_axis(part.dims), 0)
            flat = rows.reshape(rows.shape[0], -1)
            if key not in self._scales:
                self._scales[key] = flat.double().mean(0), flat.double().std(0, correction=0)
            mean, deviation = self._scales[key]
            if mean.shape[0] != flat.shape[1]:
                return None
            rows.copy_(
                (mean + deviation * self._noise(*key, part.prompt, flat.shape)).to(own.dtype).reshape(rows.shape)
            )
        return Given(placed, True, RANDOM)

    def _noise(self, module: str, call: int, prompt: int | None, shape: torch.Size) -> torch.Tensor:
        digest = xxhash.xxh3_64_intdigest(f"{self._seed}:{module}:{call}:{prompt}".encode())
        generator = torch.Generator().manual_seed(digest & _SEED_BITS)
        return torch.randn(shape, generator=generator, dtype=torch.float64)
