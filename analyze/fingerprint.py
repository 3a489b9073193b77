"""Fingerprints of sites: what of their values does not depend on names or on the order of features.

Two levels: statistics that were stored with the tensors, which cost one query, and sorted rows at a few positions
that all runs share, read from the shards. Sorting cannot increase the difference of two vectors, so sites whose
sorted rows differ by more than a tolerance do so however their features are rearranged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..store.trace import Trace
from .align import PromptPair
from .layout_search import Rows, relative
from .loading import load_sites
from .ranks import Stored
from .sites import Site, SiteInfo

#: Positions that are sampled in all, and order statistics that are kept of each.
_POSITIONS, _ORDER_STATISTICS = 8, 257
_PROMPTS = 4
#: Larger rows are not sampled; index rows that are held at once.
_MAX_ROW, _CHUNK_TENSORS = 1 << 22, 4096

#: A sampled row: the index of the prompt pair and a position, or (phase, step) where there are none.
Key: TypeAlias = tuple[int, int | tuple[str, int]]
Sample: TypeAlias = dict[Key, npt.NDArray[np.float64]]

_STATISTICS = """
SELECT module, port, slot, call, sum(n) AS n, sum(n * mean) / sum(n) AS mean,
       sqrt(greatest(sum(n * (std * std + mean * mean)) / sum(n) - (sum(n * mean) / sum(n)) ** 2, 0)) AS std,
       min(min) AS low, max(max) AS high, sum(coalesce(position_count, 1)) FILTER (rank = 0) AS positions,
       bool_or(contains(dims, '{')) AS partial
FROM (SELECT *, list_product(shape)::BIGINT - n_nan - n_inf AS n FROM tensors WHERE run = ? AND phase <> 'static')
WHERE n > 0 AND mean IS NOT NULL GROUP BY ALL
"""


@dataclass(frozen=True)
class Summary:
    """Stored statistics of a site over all its tensors: moments, extremes, and how many positions they cover."""

    mean: float
    std: float
    low: float
    high: float
    positions: int

    @property
    def absmax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def distance(self, other: Summary) -> float | None:
        """Largest difference of mean, std and extremes, in units of this summary; None over other positions."""
        if self.positions != other.positions:
            return None
        moments = max(abs(self.mean - other.mean), abs(self.std - other.std))
        extremes = max(abs(self.low - other.low), abs(self.high - other.high))
        return max(relative(moments, self.std or abs(self.mean)), relative(extremes, self.absmax))

    def within(self, other: Summary, slack: float) -> bool:
        """Whether these values can be some of the other's, as far as extremes tell."""
        room = slack * max(self.absmax, other.absmax)
        return other.low - room <= self.low and self.high <= other.high + room


def summaries(trace: Trace, run: str) -> dict[Site, Summary]:
    """Stored statistics of a run's sites, without those that are sums over ranks."""
    return {
        Site(row["module"], row["port"], row["slot"], row["call"]): Summary(
            row["mean"], row["std"], row["low"], row["high"], int(row["positions"] or 0)
        )
        for row in trace.query(_STATISTICS, [run]).to_pylist()
        if not row["partial"]
    }


class Sampler:
    """Reads a few rows of the sites of one run at positions that all runs share; keeps where they are, not the rows."""

    def __init__(self, trace: Trace, run: str, prompts: Sequence[int], positions: Sequence[Sequence[int]]) -> None:
        """Use `samplers`, which chooses prompts and positions."""
        self._trace, self._run = trace, run
        self._prompts, self._positions = prompts, positions
        self._places: dict[Site, dict[Key, Stored]] = {}

    def rows(self, site: Site) -> Sample:
        """The sampled rows of a site, whole."""
        if site not in self._places:
            self._locate([site])
        sample = {}
        for key, stored in self._places[site].items():
            at = key[1] if isinstance(key[1], int) else 0
            sample[key] = _plain(stored.rows(self._trace, range(at, at + 1)))
        return sample

    def fingerprints(self, infos: Iterable[SiteInfo]) -> dict[Site, Sample]:
        """Order statistics of the sampled rows of many sites."""
        found: dict[Site, Sample] = {}
        chunk: list[Site] = []
        held = 0
        for info in infos:
            chunk.append(info.site)
            held += info.n_tensors
            if held > _CHUNK_TENSORS:
                found.update(self._fingerprints(chunk))
                chunk, held = [], 0
        return found | self._fingerprints(chunk)

    def _fingerprints(self, sites: Sequence[Site]) -> dict[Site, Sample]:
        self._locate(sites)
        found = {site: fingerprint(self.rows(site)) for site in sites}
        self._trace.release_pages()
        return found

    def _locate(self, sites: Sequence[Site]) -> None:
        """Note which stored tensors hold the sampled rows."""
        wanted = [site for site in sites if site not in self._places]
        stored = load_sites(self._trace, [(self._run, site) for site in wanted]) if wanted else {}
        for site in wanted:
            self._places[site] = self._sampled(stored.get((self._run, site), []))

    def _sampled(self, tensors: Sequence[Stored]) -> dict[Key, Stored]:
        places: dict[Key, Stored] = {}
        for pair, (prompt, positions) in enumerate(zip(self._prompts, self._positions, strict=True)):
            for stored in tensors:
                if stored.prompt not in (prompt, -1) or stored.features > _MAX_ROW:
                    continue
                if stored.position_start is None:
                    if len(places) < _POSITIONS:
                        places[pair, (stored.phase, stored.step)] = stored
                    continue
                covered = stored.positions
                for position in positions:
                    if position in covered:
                        places.setdefault((pair, position), stored)
        return places


def samplers(trace: Trace, runs: Sequence[str | None], prompts: Sequence[PromptPair]) -> list[Sampler | None]:
    """A sampler for the reference, the baseline (None without one) and the target, in this order of runs."""
    chosen = prompts[:_PROMPTS]
    each = max(_POSITIONS // max(len(chosen), 1), 2)
    lengths = {prompt.prompt: prompt.n_tokens for prompt in trace.manifest(runs[0] or "").prompts}
    positions = [_positions(pair, lengths.get(pair.prompt, pair.n_tokens), each) for pair in chosen]
    indices: list[list[int]] = [
        [pair.prompt for pair in chosen],
        [-1 if pair.baseline is None else pair.baseline for pair in chosen],
        [pair.target for pair in chosen],
    ]
    return [
        None if run is None else Sampler(trace, run, index, positions) for run, index in zip(runs, indices, strict=True)
    ]


def _positions(pair: PromptPair, n_prompt: int, count: int) -> list[int]:
    """The prompt's last position (the only one that some heads compute), then others spread over what is shared."""
    if pair.n_common is None:
        return list(range(_POSITIONS))
    last = min(n_prompt, pair.n_common) - 1
    spread = np.linspace(max(pair.n_common - 2, 0), 1, count).astype(int)
    return [p for p in dict.fromkeys([last, *spread.tolist()]) if 0 <= p < pair.n_common][:count]


def fingerprint(sample: Sample) -> Sample:
    """Order statistics of every row: the same for every order of features."""
    found = {}
    for key, row in sample.items():
        index = np.linspace(0, row.size - 1, min(row.size, _ORDER_STATISTICS)).astype(np.int64)
        found[key] = np.sort(row)[index]
    return found


def distance(reference: Sample, other: Sample) -> float:
    """Relative L2 difference over the rows that both have; NaN when they share none."""
    shared = [key for key in reference if key in other and reference[key].size == other[key].size]
    if not shared:
        return math.nan
    with np.errstate(invalid="ignore"):  # infinite masks: their distance is NaN
        error = sum(float(np.sum((other[key] - reference[key]) ** 2)) for key in shared)
    return relative(math.sqrt(error), math.sqrt(sum(float(np.sum(reference[key] ** 2)) for key in shared)))


def stacked(first: Sample, second: Sample) -> tuple[Rows, Rows] | None:
    """The rows that two samples share, as two arrays `[positions, features]`; None when there are none."""
    shared = [key for key in first if key in second]
    widths: Mapping[str, set[int]] = {
        "first": {first[key].size for key in shared},
        "second": {second[key].size for key in shared},
    }
    if not shared or any(len(sizes) > 1 for sizes in widths.values()):
        return None
    return np.stack([first[key] for key in shared]), np.stack([second[key] for key in shared])


def _plain(row: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    flat = row.reshape(-1)
    if flat.dtype.kind == "c":
        flat = flat.view(flat.real.dtype)
    with np.errstate(invalid="ignore"):
        return flat.astype(np.float64)
