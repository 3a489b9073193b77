"""Which target site corresponds to which reference site, by name and shape, with the transform between them and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from .fusion import columns_of_part
from .naming import Proposal, Surroundings, canonical, no_counterpart, proposals, split_modules
from .pairs import EXCLUDED, INCOMPLETE, NOT_INCLUDED, STATISTICS_ONLY, Ambiguity, Gap, Pair, SiteMapping
from .sites import Site, SiteInfo

#: Proposals of this score and more are reported even if the shapes do not fit.
_CERTAIN = 0.8


def map_by_name(
    reference: Sequence[SiteInfo],
    target: Sequence[SiteInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> SiteMapping:
    """Map the sites of a reference run to those of a target run by their names and shapes.

    A reference site without a counterpart that holds the very values of a site with one (a container that returns
    what its last child returned) is skipped with that reason, and so is one that a target of this structure cannot
    have; any other is a hole.

    Args:
        reference: sites of the reference run.
        target: sites of the target run.
        include: globs over reference module paths; sites of other modules are skipped.
        exclude: globs over reference module paths to skip.
    """
    wanted, gaps = _split_by_filter(reference, include, exclude)
    names = _Names(reference, target)
    pairs: list[Pair] = []
    open_sites: list[tuple[SiteInfo, str]] = []
    for info in wanted:
        matches, reason = names.match(info)
        pairs.extend(matches)
        if not matches:
            open_sites.append((info, reason))
    gaps.extend(account_for(open_sites, wanted, pairs, names.around))
    return SiteMapping(tuple(pairs), tuple(gaps), tuple(names.ambiguous))


def account_for(
    open_sites: Iterable[tuple[SiteInfo, str]],
    wanted: Sequence[SiteInfo],
    pairs: Sequence[Pair],
    around: Surroundings,
) -> list[Gap]:
    """Holes, and sites that are none: twins of a compared site, and what such a target cannot have."""
    paired = {pair.reference for pair in pairs}
    compared = {info.content: info.site.name for info in wanted if info.site in paired}
    gaps = []
    for info, reason in open_sites:
        absent = no_counterpart(_canonical(info.site), around)
        if info.content in compared:
            gaps.append(
                Gap(info.site, "skipped", f"holds the same values as {compared[info.content]}, which is compared")
            )
        elif absent is not None:
            gaps.append(Gap(info.site, "skipped", absent))
        else:
            gaps.append(Gap(info.site, "unmatched", reason))
    return gaps


def in_dataflow_order(
    pairs: Iterable[Pair], reference: Sequence[SiteInfo], target: Sequence[SiteInfo]
) -> tuple[Pair, ...]:
    """Sort pairs by the place of the reference site, then of the target site."""
    first = {info.site: place for place, info in enumerate(reference)}
    second = {info.site: info.exec_order for info in target}
    return tuple(sorted(pairs, key=lambda pair: (first[pair.reference], second[pair.target])))


def surroundings(reference: Iterable[SiteInfo], target: Iterable[SiteInfo]) -> Surroundings:
    """What the naming rules may know of two runs."""
    return Surroundings(_slots_by_module(reference), _slots_by_module(target))


def _slots_by_module(infos: Iterable[SiteInfo]) -> dict[str, frozenset[str]]:
    slots: dict[str, frozenset[str]] = {}
    for info in infos:
        if info.site.port == "output":
            module = canonical(info.site.module)
            slots[module] = slots.get(module, frozenset()) | {info.site.slot}
    return slots


def _split_by_filter(
    reference: Sequence[SiteInfo], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[SiteInfo], list[Gap]]:
    wanted, gaps = [], []
    for info in reference:
        module = info.site.module
        if any(fnmatchcase(module, glob) for glob in exclude):
            gaps.append(Gap(info.site, "skipped", EXCLUDED))
        elif include and not any(fnmatchcase(module, glob) for glob in include):
            gaps.append(Gap(info.site, "skipped", NOT_INCLUDED))
        elif info.n_statistics_only:
            gaps.append(Gap(info.site, "skipped", STATISTICS_ONLY))
        elif info.lacking:
            gaps.append(Gap(info.site, "unmatched", f"{INCOMPLETE} {info.lacking}"))
        else:
            wanted.append(info)
    return wanted, gaps


class _Names:
    """Sites of two runs by canonical name."""

    def __init__(self, reference: Sequence[SiteInfo], target: Sequence[SiteInfo]) -> None:
        self.around = surroundings(reference, target)
        self.ambiguous: list[Ambiguity] = []
        self._features = {_canonical(info.site): info.features for info in reference}
        self._found: dict[Site, list[SiteInfo]] = {}
        for info in target:
            self._found.setdefault(_canonical(info.site), []).append(info)

    def match(self, info: SiteInfo) -> tuple[list[Pair], str]:
        """Pairs with every target module whose site is proposed and fits, or why there is none.

        When only sites of another shape are found, the best of them is paired: the comparison reports the mismatch.
        """
        site = _canonical(info.site)
        fitting: dict[str, tuple[int, Pair]] = {}
        clash: list[Pair] = []
        for proposal in proposals(site, self.around):
            candidates = self._candidates(info, proposal.target)
            if len(candidates) > 1:
                return [], self._refuse(info.site, candidates)
            if not candidates or proposal.target.module in fitting:
                continue
            target = candidates[0]
            if unreadable := _unreadable(target):
                return [], unreadable
            pair = self._pair(info, proposal, target)
            if pair is not None:
                fitting[proposal.target.module] = target.exec_order, pair
            elif not proposal.parts and proposal.score >= _CERTAIN:
                clash.append(Pair(info.site, target.site, None, proposal.score, proposal.reason))
        ordered = [pair for _, pair in sorted(fitting.values(), key=lambda item: item[0])]
        found = ordered or self._parts(info) or clash[:1]
        return found, "the target has no site of this name or of a known counterpart"

    def _pair(self, info: SiteInfo, proposal: Proposal, target: SiteInfo) -> Pair | None:
        """The pair that a proposal amounts to, or None if the shapes do not allow it."""
        pair = Pair(info.site, target.site, None, proposal.score, proposal.reason)
        if proposal.parts:
            site = _canonical(info.site)
            widths = [self._features.get(replace(site, module=part)) for part in proposal.parts]
            columns = columns_of_part(proposal.parts.index(site.module), widths, target)
            return None if columns is None else replace(pair, columns=columns)
        if target.features == info.features and (proposal.score >= _CERTAIN or target.positioned == info.positioned):
            return pair
        if proposal.leading and info.features and target.features == 2 * info.features:
            reason = f"{proposal.reason}, with every angle twice"
            return replace(pair, columns=((0, info.features),), reason=reason)
        return None

    def _parts(self, info: SiteInfo) -> list[Pair]:
        """Pairs of a fused reference site with the target sites whose widths add up to its own."""
        if info.site.slot or info.site.port != "output":
            return []
        for sites, reason in split_modules(canonical(info.site.module)):
            parts = [self._candidates(info, replace(site, call=info.site.call)) for site in sites]
            widths = [part[0].features for part in parts if len(part) == 1 and not _unreadable(part[0])]
            known = [width for width in widths if width is not None]
            if len(known) == len(sites) and sum(known) == info.features:
                starts = [sum(known[:index]) for index in range(len(known))]
                return [
                    Pair(info.site, part[0].site, None, 0.8, reason, ((start, start + width),))
                    for part, start, width in zip(parts, starts, known, strict=True)
                ]
        return []

    def _candidates(self, info: SiteInfo, site: Site) -> list[SiteInfo]:
        """Target sites of a canonical name; one is enough if it has the reference's very name or all hold the same."""
        candidates = self._found.get(site, [])
        exact = [candidate for candidate in candidates if candidate.site.module == info.site.module]
        if len(exact) == 1:
            return exact
        return candidates[:1] if len({candidate.content for candidate in candidates}) == 1 else candidates

    def _refuse(self, site: Site, candidates: Sequence[SiteInfo]) -> str:
        names = ", ".join(candidate.site.name for candidate in candidates)
        reason = f"several target sites have this name and hold different values: {names}; name one in a mapping file"
        self.ambiguous.append(Ambiguity(site, tuple(candidate.site for candidate in candidates), reason))
        return reason


def _unreadable(target: SiteInfo) -> str:
    if target.n_statistics_only:
        return f"the target's {target.site.name} holds statistics only"
    return f"of the target's {target.site.name}, {target.lacking}" if target.lacking else ""


def _canonical(site: Site) -> Site:
    return replace(site, module=canonical(site.module))
