"""Finding the target sites that hold a reference site's values, whatever they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..store.trace import Trace
from .align import PromptPair
from .fingerprint import Sample, Sampler, Summary, distance, fingerprint, samplers, stacked, summaries
from .layout_search import Found, find_features
from .ranks import Columns
from .sites import Site, SiteInfo

#: Relative difference that the sites of two correct runs may have, by the target's dtype, without a baseline.
ROUNDING = {"float64": 1e-9, "float32": 3e-5, "float16": 4e-3, "bfloat16": 3e-2}
#: With a baseline: this many times its own difference from the reference.
_BASELINE_FACTOR = 4.0
#: Stored statistics may differ by this much before values are read.
_STATISTICS_SLACK = 0.1
#: Sites of another width that are tried, and how many times wider they may be.
_WIDTH_CANDIDATES, _WIDTH_RATIO = 64, 8


@dataclass(frozen=True)
class Candidate:
    """A target site that holds a reference site's values; `found` tells which features of the wider of the two."""

    info: SiteInfo
    found: Found


def has_values(info: SiteInfo) -> bool:
    """Whether the values of a site can be read: of every rank, and not statistics alone."""
    return not info.n_statistics_only and not info.lacking


class ValueSearch:
    """Values of the runs of a comparison at a few positions."""

    def __init__(
        self,
        trace: Trace,
        runs: tuple[str, str | None, str],
        reference: Sequence[SiteInfo],
        target: Sequence[SiteInfo],
        prompts: Sequence[PromptPair],
    ) -> None:
        """Read the fingerprints of the target.

        Args:
            trace: the trace.
            runs: names of the reference, the baseline (or None) and the target.
            reference: sites of the reference.
            target: sites of the target; those without values take no part.
            prompts: prompts that the runs share.
        """
        self._trace, self._runs = trace, runs
        self._target = [info for info in target if info.features and has_values(info)]
        self._depths = [max((info.exec_order for info in infos), default=0) or 1 for infos in (reference, target)]
        self._read, self._read_baseline, self._read_target = samplers(trace, runs, prompts)
        self.rounding = ROUNDING.get(trace.manifest(runs[2]).dtype, ROUNDING["bfloat16"])
        self._prints = self._read_target.fingerprints(self._target) if self._read_target else {}
        self._statistics: tuple[dict[Site, Summary], dict[Site, Summary]] | None = None

    def tolerances(self, infos: Iterable[SiteInfo]) -> dict[Site, tuple[float, Sample]]:
        """How far the target may be from each reference site, and the site's fingerprint."""
        infos = list(infos)
        own = self._read.fingerprints(infos) if self._read else {}
        baseline = self._read_baseline.fingerprints(infos) if self._read_baseline else {}
        found = {}
        for info in infos:
            sample = own.get(info.site, {})
            noise = distance(sample, baseline.get(info.site, {}))
            tolerance = max(_BASELINE_FACTOR * noise, self.rounding / 8) if math.isfinite(noise) else self.rounding
            found[info.site] = tolerance, sample
        return found

    def apart(self, sample: Sample, target: Site) -> float:
        """Relative difference of a fingerprint and a target site's; NaN when they share no position."""
        return distance(sample, self._prints.get(target, {}))

    def fit(self, reference: Site, target: Site, tolerance: float, *, in_order: bool = False) -> Found | None:
        """The target's features that hold the reference's values."""
        rows = stacked(_rows(self._read, reference), _rows(self._read_target, target))
        return find_features(*rows, tolerance, in_order=in_order) if rows else None

    def equally_wide(self, info: SiteInfo, tolerance: float) -> list[Candidate]:
        """Target sites of equal width that hold the values, in whatever order of features."""
        own = _rows(self._read, info.site)
        if not any(row.std() > 0 for row in own.values() if row.size):
            return []  # constants are equal everywhere
        own_print = fingerprint(own)
        candidates = []
        for other in self._target:
            if other.features != info.features or other.site.port != info.site.port:
                continue
            summary = self._summaries(info, other)
            apart = summary[0].distance(summary[1]) if summary else None
            if apart is not None and apart > _STATISTICS_SLACK + _BASELINE_FACTOR * tolerance:
                continue
            if self.apart(own_print, other.site) <= tolerance:
                rows = stacked(own, _rows(self._read_target, other.site))
                found = find_features(*rows, tolerance) if rows else None
                if found is not None:
                    candidates.append(Candidate(other, found))
        return candidates

    def wider(self, info: SiteInfo, tolerance: float) -> list[Candidate]:
        """Target sites that hold the values among others."""
        own = _rows(self._read, info.site)
        candidates = []
        for other in self._of_other_width(info, wider=True):
            rows = stacked(own, _rows(self._read_target, other.site))
            found = find_features(*rows, tolerance) if rows else None
            if found is not None:
                candidates.append(Candidate(other, found))
        return candidates

    def pieces(self, info: SiteInfo, tolerance: float) -> list[Candidate]:
        """Narrower target sites that make up a site between them, each of its features once; empty if none do."""
        own = _rows(self._read, info.site)
        parts: dict[Columns, Candidate] = {}
        for other in self._of_other_width(info, wider=False):
            rows = stacked(_rows(self._read_target, other.site), own)
            found = find_features(*rows, tolerance) if rows else None
            if found is not None and found.columns is not None:
                parts.setdefault(found.columns, Candidate(other, found))
        covered = sorted(span for columns in parts for span in columns)
        starts, stops = [start for start, _ in covered], [stop for _, stop in covered]
        return list(parts.values()) if [*starts, info.features] == [0, *stops] else []

    def _of_other_width(self, info: SiteInfo, *, wider: bool) -> list[SiteInfo]:
        """Target sites of which a site can be a part (or the other way round), nearest in dataflow order first."""
        fitting = [other for other in self._target if self._may_hold(info, other, wider=wider)]
        place = info.exec_order / self._depths[0]
        return sorted(fitting, key=lambda other: abs(other.exec_order / self._depths[1] - place))[:_WIDTH_CANDIDATES]

    def _may_hold(self, info: SiteInfo, other: SiteInfo, *, wider: bool) -> bool:
        narrow, wide = (info.features or 0, other.features or 0)[:: 1 if wider else -1]
        if not 0 < narrow < wide <= _WIDTH_RATIO * narrow or other.site.port != info.site.port:
            return False
        summary = self._summaries(info, other)
        if summary is None:
            return True
        part, whole = summary[:: 1 if wider else -1]
        return part.within(whole, _STATISTICS_SLACK)

    def _summaries(self, info: SiteInfo, other: SiteInfo) -> tuple[Summary, Summary] | None:
        if self._statistics is None:
            self._statistics = summaries(self._trace, self._runs[0]), summaries(self._trace, self._runs[2])
        first, second = self._statistics[0].get(info.site), self._statistics[1].get(other.site)
        return None if first is None or second is None else (first, second)


def _rows(sampler: Sampler | None, site: Site) -> Sample:
    return sampler.rows(site) if sampler else {}


def closest(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Candidates by what remains between them and the reference."""
    yield from sorted(candidates, key=lambda candidate: candidate.found.residual)
