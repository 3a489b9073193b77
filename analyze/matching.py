"""The mapping of two runs of a trace: by name, checked and completed by values, overridden by the user.

Names win where they are unique: a target site with the right name is compared even if its values are wrong, since
finding that is the point. Values add pairs for sites whose names say nothing, and warn where a site has the name of
one reference site and the values of another. Where values leave a choice, no pair is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..store.progress import Progress, no_progress
from ..store.trace import Trace
from .align import PromptPair
from .batching import without_batch_sites
from .component_mapping import read_component_mapping
from .expert_pairs import with_fused_experts
from .fingerprint import Sample
from .interfaces import without_other_inputs
from .mapping import account_for, in_dataflow_order, map_by_name, surroundings
from .pairs import Ambiguity, Gap, Pair, SiteMapping
from .routed_rows import with_tokens, without_routed_rows
from .sites import Site, SiteInfo, sites_of
from .user_mapping import ModulesOf, apply_components
from .value_search import Candidate, ValueSearch, closest, has_values

#: A value this many times nearer than the next is the one that is meant.
_CLEARLY = 4.0


@dataclass(frozen=True)
class MappedRuns:
    """A mapping, and the sites of both runs in execution order."""

    mapping: SiteMapping
    reference: list[SiteInfo]
    target: list[SiteInfo]


def map_runs(
    trace: Trace,
    runs: tuple[str, str | None, str],
    prompts: Sequence[PromptPair],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    file: Path | None = None,
    progress: Progress = no_progress,
) -> MappedRuns:
    """Map the sites of a reference to those of a target.

    Args:
        trace: the trace.
        runs: names of the reference, of a baseline that tells how far values may be apart (or None), of the target.
        prompts: prompts that the runs share.
        include: globs over reference module paths; all by default.
        exclude: globs over reference module paths to skip.
        file: a component mapping that overrides what is found.
        progress: told about the sites on the way.

    Raises:
        TraceNotFoundError: a run does not exist.
        InputError: the file is not a component mapping, or names a module that its run does not have.
    """
    reference, baseline, target = (with_tokens(trace, run, sites_of(trace, run)) if run else [] for run in runs)
    mapping = map_by_name(reference, target, include=include, exclude=exclude)
    mapping = with_fused_experts(mapping, reference, target)
    if file is not None:
        sides = [
            ModulesOf(run, infos, [module.path for module in trace.manifest(run).modules])
            for run, infos in ((runs[0], reference), (runs[2], target))
        ]
        mapping = apply_components(mapping, read_component_mapping(file), sides[0], sides[1])
    mapping = without_routed_rows(trace, mapping, runs, (reference, baseline, target))
    mapping = without_batch_sites(trace, mapping, runs, reference, target)
    mapping = without_other_inputs(mapping, reference, target)
    if prompts:
        search = ValueSearch(trace, runs, reference, target, prompts)
        mapping = _Completion(trace, search, reference, target).complete(mapping, progress)
    return MappedRuns(mapping, reference, target)


class _Completion:
    """Checks pairs by values, and adds those that only values tell."""

    def __init__(
        self, trace: Trace, search: ValueSearch, reference: Sequence[SiteInfo], target: Sequence[SiteInfo]
    ) -> None:
        self._trace, self._search, self._infos, self._targets = trace, search, list(reference), list(target)
        self._reference = {info.site: info for info in reference}
        self._target = {info.site: info for info in target if has_values(info)}

    def complete(self, mapping: SiteMapping, progress: Progress) -> SiteMapping:
        """The mapping with scores from values, warnings, and pairs for sites that had none."""
        refused = {note.site for note in mapping.ambiguous}
        holes = [gap for gap in mapping.gaps if gap.status == "unmatched" and gap.site not in refused]
        holes = [gap for gap in holes if self._searchable(gap)]
        pairs, ambiguous = self._check(mapping.pairs)
        ambiguous = [*mapping.ambiguous, *ambiguous]
        taken = {pair.target for pair in pairs}
        tolerances = self._search.tolerances(self._reference[gap.site] for gap in holes)
        reasons = {gap.site: gap.reason for gap in holes}
        for number, gap in enumerate(holes):
            progress(f"values of {gap.site.name}", number, len(holes))
            found, note = self._by_values(self._reference[gap.site], tolerances[gap.site][0], taken)
            pairs.extend(found)
            if note is not None:
                ambiguous.append(note)
                reasons[gap.site] = note.reason
            self._trace.release_pages()
        paired = {pair.reference for pair in pairs}
        still_open = [(self._reference[site], reason) for site, reason in reasons.items() if site not in paired]
        kept = [gap for gap in mapping.gaps if gap.site not in reasons]
        around = surroundings(self._infos, self._targets)
        return replace(
            mapping,
            pairs=in_dataflow_order(pairs, self._infos, self._targets),
            gaps=(*kept, *account_for(still_open, self._infos, pairs, around)),
            ambiguous=tuple(ambiguous),
        )

    def _searchable(self, gap: Gap) -> bool:
        info = self._reference[gap.site]
        return bool(info.features) and has_values(info)

    def _check(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Ambiguity]]:
        """Score named pairs by their values, fit those of another width, and note where values contradict a name."""
        whole = dict.fromkeys(pair.reference for pair in pairs if pair.transform == "identity")
        tolerances = self._search.tolerances(self._reference[site] for site in whole)
        checked: list[Pair] = []
        notes: list[Ambiguity] = []
        for pair in pairs:
            if pair.transform != "identity":
                checked.append(pair)
                continue
            tolerance, sample = tolerances[pair.reference]
            if self._reference[pair.reference].features != self._target[pair.target].features:
                checked.append(self._fitted(pair, tolerance))
                continue
            apart = self._search.apart(sample, pair.target)
            checked.append(_scored(pair, apart, tolerance))
            if apart > tolerance:
                notes.extend(self._contradiction(pair, tolerance, sample))
        return checked, notes

    def _fitted(self, pair: Pair, tolerance: float) -> Pair:
        """A wider target of the right name may hold repeated or padded heads: take those that agree, in order."""
        width, available = self._reference[pair.reference].features, self._target[pair.target].features
        if not width or not available or available < width:
            return pair
        found = self._search.fit(pair.reference, pair.target, tolerance, in_order=True)
        if found is None:
            return pair
        reason = f"{pair.reason}; {width} of its {available} features have the reference's values"
        return replace(pair, columns=found.columns, reason=reason)

    def _contradiction(self, pair: Pair, tolerance: float, sample: Sample) -> Iterator[Ambiguity]:
        """A note when another target site holds the values that the named one should."""
        info = self._reference[pair.reference]
        others = self._search.equally_wide(info, tolerance)
        named = self._search.apart(sample, pair.target)
        clear = [other for other in others if _CLEARLY * self._search.apart(sample, other.info.site) < named]
        best = next(closest(clear), None)
        if best is not None:
            reason = f"compared with {pair.target.name} by name, but its values are those of {best.info.site.name}"
            yield Ambiguity(pair.reference, (pair.target, best.info.site), reason)

    def _by_values(self, info: SiteInfo, tolerance: float, taken: set[Site]) -> tuple[list[Pair], Ambiguity | None]:
        """Pairs of a site by values alone, or the choice that they leave."""
        found = self._search.equally_wide(info, tolerance)
        found = [candidate for candidate in found if candidate.info.site not in taken] or found
        found = found or self._search.wider(info, tolerance)
        if not found:
            parts = self._search.pieces(info, tolerance)
            return [_part(info, part, tolerance) for part in parts], None
        best, *others = closest(found)
        limit = _CLEARLY * max(best.found.residual, self._search.rounding / 64)
        rivals = [o for o in others if o.info.content != best.info.content and o.found.residual <= limit]
        if rivals:
            sites = tuple(candidate.info.site for candidate in (best, *rivals))
            names = ", ".join(site.name for site in sites)
            reason = f"its values fit several target sites: {names}; name one in a mapping file"
            return [], Ambiguity(info.site, sites, reason)
        same = [other for other in (best, *others) if other.info.content == best.info.content]
        first = min(same, key=lambda candidate: candidate.info.exec_order)
        return [_whole(info, first, tolerance, len(same) - 1)], None


def _whole(info: SiteInfo, candidate: Candidate, tolerance: float, n_same: int) -> Pair:
    found, target = candidate.found, candidate.info
    how = "" if found.columns is None else ", in another order"
    if info.features != target.features:
        how = f", which are {info.features} of its {target.features} features"
    also = f"; {n_same} more target sites hold the same" if n_same else ""
    reason = f"its values{how} (relative difference {found.residual:.1e}){also}"
    return Pair(info.site, target.site, found.columns, _by_residual(found.residual, tolerance), reason)


def _part(info: SiteInfo, candidate: Candidate, tolerance: float) -> Pair:
    found, target = candidate.found, candidate.info
    reason = f"its values, {target.features} of the reference's {info.features} features"
    reason += f" (relative difference {found.residual:.1e})"
    score = _by_residual(found.residual, tolerance)
    return Pair(info.site, target.site, None, score, reason, found.columns)


def _by_residual(residual: float, tolerance: float) -> float:
    """1 for equal values, one half at the tolerance."""
    return tolerance / (tolerance + residual) if tolerance + residual > 0 else 1.0


def _scored(pair: Pair, apart: float, tolerance: float) -> Pair:
    """Lower the score of a named pair whose values are further apart than rounding explains."""
    if not apart > tolerance:
        return pair
    return replace(pair, score=pair.score * tolerance / apart, reason=f"{pair.reason}; its values differ")
