"""The values of a run under the names of another run's sites, as tensors of the shape that the other run's have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...analyze.loading import load_sites
from ...analyze.naming import MAIN_SLOTS
from ...analyze.pairs import Pair
from ...analyze.ranks import Stored
from ...analyze.sites import Site, SiteInfo
from ...store.dims import parse_dims
from ...store.trace import Trace
from ..layout import StepLayout, cut


@dataclass(frozen=True)
class Given:
    """Values that take the place of a tensor.

    Attributes:
        values: shape and dtype of the tensor; positions that nobody has values for keep its own.
        complete: values were found for every position.
        site: where they come from, by its name in the run that they come from.
    """

    values: torch.Tensor
    complete: bool
    site: str


class ValueSource(Protocol):
    """Whoever knows values for the inputs and outputs of modules."""

    def output(self, site: Site, own: torch.Tensor, layout: StepLayout) -> Given | None:
        """Values for an output, None to keep the module's own."""

    def input(self, site: Site, own: torch.Tensor, layout: StepLayout, *, main: bool) -> Given | None:
        """Values for an argument, None to keep what the module was called with; `main`: it is the first tensor."""


class MappedValues:
    """The values of a run, looked up through a mapping of sites."""

    def __init__(self, trace: Trace, run: str, pairs: Iterable[Pair], sites: Sequence[SiteInfo]) -> None:
        """Find where values are stored; none is read yet.

        Args:
            trace: the trace.
            run: whose values.
            pairs: what corresponds to the sites that will be asked for. Where several target sites hold one site, the
                last one computed counts: it is what the run went on with.
            sites: all sites of the run.
        """
        self._trace, self._run = trace, run
        readable = [info for info in sites if info.positioned and not info.n_statistics_only and not info.lacking]
        order = {info.site: info.exec_order for info in readable}
        self._pairs: dict[Site, list[Pair]] = {}
        self._modules: dict[str, list[str]] = {}
        for pair in sorted(pairs, key=lambda pair: order.get(pair.target, -1)):
            if pair.target in order:
                self._pairs.setdefault(pair.reference, []).append(pair)
                self._modules.setdefault(pair.reference.module, []).append(pair.target.module)
        self._inputs: dict[str, list[Site]] = {}
        for info in readable:
            if info.site.port == "input":
                self._inputs.setdefault(info.site.module, []).append(info.site)
        wanted = {pair.target for found in self._pairs.values() for pair in found}
        wanted |= {site for found in self._inputs.values() for site in found}
        self._stored = load_sites(trace, [(run, site) for site in wanted])

    @property
    def outputs(self) -> frozenset[Site]:
        """Sites of the reference for which there are values."""
        return frozenset(self._pairs)

    def output(self, site: Site, own: torch.Tensor, layout: StepLayout) -> Given | None:
        """See `ValueSource`."""
        return self._placed(self._pairs.get(site, ()), own, layout)

    def input(self, site: Site, own: torch.Tensor, layout: StepLayout, *, main: bool) -> Given | None:
        """See `ValueSource`; the argument of the same name counts, else the first one for the first one.

        Of several modules that hold the output the first counts: later ones pass it on.
        """
        for module in dict.fromkeys(self._modules.get(site.module, ())):
            known = [found for found in self._inputs.get(module, ()) if found.call == site.call]
            same = [found for found in known if found.slot == site.slot]
            first = [found for found in known if main and found.slot in MAIN_SLOTS and self._is_float(found)]
            for found in (*same, *first):
                if given := self._placed([Pair(site, found, None, 1.0, "")], own, layout):
                    return given
        return None

    def release(self) -> None:
        """Give mapped memory back."""
        self._trace.release_pages()

    def _is_float(self, site: Site) -> bool:
        return all("float" in stored.dtype for stored in self._stored.get((self._run, site), ()))

    def _placed(self, pairs: Sequence[Pair], own: torch.Tensor, layout: StepLayout) -> Given | None:
        """A copy of a tensor with the values of some pairs in place of its own, None when there are none."""
        if not pairs:
            return None
        placed = own.clone()
        complete, anything = True, False
        for part in cut(placed, layout, last_only=False):
            if part.position_start is None or part.position_count is None or part.prompt is None:
                return None
            positions = range(part.position_start, part.position_start + part.position_count)
            found = self._rows(pairs, part.prompt, positions, part.values.numel() // max(len(positions), 1))
            if found is None:
                complete = False
                continue
            values, known = found
            rows = part.values.movedim(position_axis(part.dims), 0)
            new = torch.from_numpy(values).to(own.dtype).reshape(rows.shape)
            rows.copy_(torch.where(torch.from_numpy(known).reshape(-1, *[1] * (rows.ndim - 1)), new, rows))
            complete, anything = complete and bool(known.all()), True
        return Given(placed, complete, pairs[-1].target.name) if anything else None

    def _rows(
        self, pairs: Sequence[Pair], prompt: int, positions: range, features: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]] | None:
        """`[positions, features]` and which positions have values, None when none has; later pairs win."""
        values: npt.NDArray[Any] | None = None
        filled = np.zeros((len(positions), features), bool)
        for pair in pairs:
            spans = pair.reference_columns or ((0, features),)
            columns = np.concatenate([np.arange(start, stop) for start, stop in spans])
            done = np.zeros(len(positions), bool)
            for span, stored in self._covering(pair.target, prompt, positions):
                place = np.array(
                    [position - positions.start for position in span if not done[position - positions.start]]
                )
                rows = _plain(stored.rows(self._trace, span, pair.columns))
                if rows.shape[1] != len(columns) or not len(place) or columns[-1] >= features:
                    continue
                if values is None:
                    values = np.zeros((len(positions), features), rows.dtype)
                values[np.ix_(place, columns)] = rows[place + positions.start - span.start]
                filled[np.ix_(place, columns)] = True
                done[place] = True
        known: npt.NDArray[np.bool_] = np.all(filled, axis=1)
        return None if values is None or not known.any() else (values, known)

    def _covering(self, site: Site, prompt: int, positions: range) -> Iterable[tuple[range, Stored]]:
        """Tensors of a site that hold some of the positions, in the order in which they were computed."""
        for stored in self._stored.get((self._run, site), ()):
            if stored.prompt == prompt and stored.position_start is not None and stored.held is None:
                stop = stored.position_start + (stored.position_count or 0)
                span = range(max(positions.start, stored.position_start), min(positions.stop, stop))
                if span:
                    yield span, stored


def position_axis(dims: str) -> int:
    """The axis of token positions; the first where dims name none."""
    return parse_dims(dims).position_axis or 0


def _plain(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values that torch reads: 16-bit and 8-bit floats that numpy lacks become float32, which holds them exactly."""
    return rows.astype(np.float32) if rows.dtype.kind == "V" else rows
