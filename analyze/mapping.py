"""Which target site corresponds to which reference site, with the transform between them and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .naming import canonical, proposals
from .sites import Site, SiteInfo


@dataclass(frozen=True)
class Pair:
    """A reference site and its counterpart.

    Attributes:
        reference: the reference site.
        target: the target site.
        columns: the target's features that belong to the reference site, `(start, stop)`; None means all.
        score: how sure the mapping is, from 0 to 1.
        reason: why the two belong together.
    """

    reference: Site
    target: Site
    columns: tuple[int, int] | None
    score: float
    reason: str

    @property
    def transform(self) -> str:
        """`identity`, or `slice` when the target holds more than the reference site."""
        return "identity" if self.columns is None else "slice"


@dataclass(frozen=True)
class Gap:
    """A reference site that is not compared.

    Attributes:
        site: the reference site.
        status: `unmatched` (a hole) or `skipped` (accounted for).
        reason: why.
    """

    site: Site
    status: str
    reason: str


@dataclass(frozen=True)
class SiteMapping:
    """Every reference site, either paired or accounted for.

    A reference site has a pair for every module of the target that computes the same values: the fused projection and
    the split that follows it are told apart that way. Pairs are in dataflow order: of the reference, then of the target.
    """

    pairs: tuple[Pair, ...]
    gaps: tuple[Gap, ...]


def map_by_name(
    reference: Sequence[SiteInfo],
    target: Sequence[SiteInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> SiteMapping:
    """Map the sites of a reference run to those of a target run by their names and shapes.

    A reference site without a counterpart that holds the very values of a site with one (a container that returns
    what its last child returned) is skipped with that reason; any other is a hole.

    Args:
        reference: sites of the reference run.
        target: sites of the target run.
        include: globs over reference module paths; sites of other modules are skipped.
        exclude: globs over reference module paths to skip.
    """
    wanted, gaps = _split_by_filter(reference, include, exclude)
    found = {_canonical(info.site): info for info in target}
    features = {_canonical(info.site): info.features for info in reference}
    pairs: list[Pair] = []
    open_sites: list[tuple[SiteInfo, str]] = []
    for info in wanted:
        matches, reason = _match(info, found, features)
        pairs.extend(matches)
        if not matches:
            open_sites.append((info, reason))
    paired = {pair.reference for pair in pairs}
    matched = {info.content: info.site.name for info in wanted if info.site in paired}
    for info, reason in open_sites:
        twin = matched.get(info.content)
        if twin is not None:
            gaps.append(Gap(info.site, "skipped", f"holds the same values as {twin}, which is compared"))
        else:
            gaps.append(Gap(info.site, "unmatched", reason))
    return SiteMapping(tuple(pairs), tuple(gaps))


def _split_by_filter(
    reference: Sequence[SiteInfo], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[SiteInfo], list[Gap]]:
    wanted, gaps = [], []
    for info in reference:
        module = info.site.module
        if any(fnmatchcase(module, glob) for glob in exclude):
            gaps.append(Gap(info.site, "skipped", "excluded by the user"))
        elif include and not any(fnmatchcase(module, glob) for glob in include):
            gaps.append(Gap(info.site, "skipped", "not among the sites the user asked for"))
        elif info.n_statistics_only:
            gaps.append(Gap(info.site, "skipped", "the reference holds statistics only"))
        else:
            wanted.append(info)
    return wanted, gaps


def _match(info: SiteInfo, found: dict[Site, SiteInfo], features: dict[Site, int | None]) -> tuple[list[Pair], str]:
    """Pairs with every target module whose site is proposed and fits, or why there is none.

    When only sites of another shape are found, the best of them is paired: the comparison reports the mismatch.
    """
    site = _canonical(info.site)
    fitting: dict[str, tuple[int, Pair]] = {}
    clash: list[Pair] = []
    for proposal in proposals(site):
        target = found.get(proposal.target)
        if target is None or proposal.target.module in fitting:
            continue
        if target.n_statistics_only:
            return [], f"the target's {target.site.name} holds statistics only"
        columns = _columns(site, proposal.parts, features, target) if proposal.parts else None
        if proposal.parts and columns is None:
            continue
        pair = Pair(info.site, target.site, columns, proposal.score, proposal.reason)
        if columns is not None or target.features == info.features:
            fitting[proposal.target.module] = target.exec_order, pair
        else:
            clash.append(pair)
    ordered = [pair for _, pair in sorted(fitting.values(), key=lambda item: item[0])]
    return ordered or clash[:1], "the target has no site of this name or of a known counterpart"


def _columns(
    site: Site, parts: tuple[str, ...], features: dict[Site, int | None], target: SiteInfo
) -> tuple[int, int] | None:
    """Where a site's features lie in a fused target, if the widths of all its parts add up."""
    widths = [features.get(Site(part, site.port, site.slot, site.call)) for part in parts]
    if target.features is None or any(width is None for width in widths):
        return None
    known = [width for width in widths if width is not None]
    if sum(known) != target.features:
        return None
    index = parts.index(site.module)
    start = sum(known[:index])
    return start, start + known[index]


def _canonical(site: Site) -> Site:
    return Site(canonical(site.module), site.port, site.slot, site.call)
