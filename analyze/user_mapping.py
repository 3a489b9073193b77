"""Applying a component mapping that a user wrote: its pairs replace what names and values say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..store.errors import InputError
from .component_mapping import Component, ComponentMapping
from .fusion import columns_of_part
from .mapping import in_dataflow_order
from .naming import MAIN_SLOTS, canonical
from .pairs import Gap, Pair, SiteMapping
from .ranks import Columns
from .sites import Site, SiteInfo

_SITE = re.compile(r"(?P<module>[^\[\]#:]*)(?:#(?P<call>\d+))?(?::(?P<port>\w+))?(?:\[(?P<slot>[^\]]+)\])?")
_SCORE = 1.0


class ModulesOf:
    """The modules of one run by name, recorded or not."""

    def __init__(self, run: str, infos: Sequence[SiteInfo], modules: Sequence[str]) -> None:
        """`modules` are all that the model has, `infos` what was recorded of them."""
        self.run, self.infos = run, infos
        self._known = {*modules, *(info.site.module for info in infos)}
        self._by_site = {info.site: info for info in infos}

    def find(self, name: str, file: str) -> list[SiteInfo]:
        """The sites that a name means, one per call of the module; none when the module was not recorded.

        Raises:
            InputError: the run has no such module or site.
        """
        match = _SITE.fullmatch(name)
        module = self._module(match["module"]) if match else None
        if match is None or module is None:
            raise InputError(f"{file}: run {self.run!r} has no module {name!r}{self._similar(name)}")
        wanted = Site(module, match["port"] or "output", match["slot"] or "", int(match["call"] or 0))
        calls = sorted({i.site.call for i in self.infos if i.site.module == module}) if not match["call"] else []
        slots = (wanted.slot,) if wanted.slot else (*MAIN_SLOTS, *(("logits",) if module == "" else ()))
        found = []
        for call in calls or [wanted.call]:
            sites = [replace(wanted, slot=slot, call=call) for slot in slots]
            found.extend([self._by_site[site] for site in sites if site in self._by_site][:1])
        recorded = sorted({i.site.slot for i in self.infos if i.site.module == module and i.site.port == wanted.port})
        if recorded and not found:
            listed = ", ".join(repr(slot) for slot in recorded)
            raise InputError(f"{file}: {name!r} of run {self.run!r} has no such output; it recorded {listed}")
        return found

    def _module(self, name: str) -> str | None:
        """The module of that path, or the only one that has it but for wrapping components."""
        name = "" if name == "(root)" else name
        if name in self._known:
            return name
        same = [module for module in self._known if canonical(module) == canonical(name)]
        return same[0] if len(same) == 1 else None

    def _similar(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._known, n=3)
        return f"; close ones: {', '.join(close)}" if close else ""


def apply_components(
    mapping: SiteMapping, components: ComponentMapping, reference: ModulesOf, target: ModulesOf
) -> SiteMapping:
    """Override a mapping.

    Sites that the user filtered out stay out. A site named without a counterpart is skipped with the file's reasoning.

    Args:
        mapping: what names say.
        components: what the user says.
        reference: the reference's modules.
        target: the target's.

    Raises:
        InputError: an entry names a module that its run does not have, or widths that cannot belong together.
    """
    closed = {gap.site for gap in mapping.gaps if gap.final}
    pairs: dict[tuple[Site, Site], Pair] = {}
    gaps: dict[Site, Gap] = {}
    for component in components.components:
        for item in _resolved(component, components.name, reference, target):
            site = item.reference if isinstance(item, Pair) else item.site
            if site in closed:
                continue
            if isinstance(item, Pair):
                pairs[item.reference, item.target] = item
            else:
                gaps[site] = item
    own = {pair.reference for pair in pairs.values()}
    claimed = own | gaps.keys()
    taken = {pair.target for pair in pairs.values()}
    kept = [pair for pair in mapping.pairs if pair.reference not in claimed and pair.target not in taken]
    lost = {pair.reference for pair in mapping.pairs} - claimed - {pair.reference for pair in kept}
    holes = [Gap(site, "unmatched", f"{components.name} gives its counterpart to another site") for site in lost]
    return replace(
        mapping,
        pairs=in_dataflow_order([*kept, *pairs.values()], reference.infos, target.infos),
        gaps=(
            *(gap for gap in mapping.gaps if gap.site not in claimed),
            *(gap for site, gap in gaps.items() if site not in own),
            *holes,
        ),
        ambiguous=tuple(note for note in mapping.ambiguous if note.site not in claimed),
        origin=components.name,
    )


def _resolved(component: Component, file: str, reference: ModulesOf, target: ModulesOf) -> Iterator[Pair | Gap]:
    sources = [reference.find(name, file) for name in component.sources]
    targets = [target.find(name, file) for name in component.targets]
    why = f"{file}: {component.reasoning}" if component.reasoning else f"by {file}"
    calls = sorted({info.site.call for infos in sources for info in infos})
    for call in calls:
        own = [info for infos in sources for info in infos if info.site.call == call]
        other = [info for infos in targets for info in infos if info.site.call == call]
        if not component.targets:
            yield from (Gap(info.site, "skipped", f"no counterpart, says {why}") for info in own)
            continue
        readable = [info for info in other if not info.n_statistics_only and not info.lacking]
        if len(readable) < len(targets) or len(own) < len(sources):
            reason = f"{file} maps it to {', '.join(component.targets)}, of which values were not recorded"
            yield from (Gap(info.site, "unmatched", reason) for info in own)
            continue
        yield from _pairs(component, own, readable, why, file)


def _pairs(
    component: Component, sources: Sequence[SiteInfo], targets: Sequence[SiteInfo], why: str, file: str
) -> Iterator[Pair]:
    """Pairs of an entry: one to one, copies of one width, or both sides laid side by side along the features."""
    one_to_one = len(sources) == len(targets) == 1
    widths = {info.features for info in (*sources, *targets)}
    if one_to_one or (len(widths) == 1 and 1 in (len(sources), len(targets))):
        for source in sources:
            for target in targets:
                columns = component.target_columns, component.reference_columns
                yield Pair(source.site, target.site, columns[0], _SCORE, why, columns[1])
        return
    if len(targets) == 1 and targets[0].shards > 1:
        fused = [columns_of_part(i, [s.features for s in sources], targets[0]) for i in range(len(sources))]
        if all(columns is not None for columns in fused):
            for source, columns_ in zip(sources, fused, strict=True):
                yield Pair(source.site, targets[0].site, columns_, _SCORE, why)
            return
    starts = [_offsets(infos) for infos in (sources, targets)]
    if starts[0] is None or starts[1] is None or starts[0][-1] != starts[1][-1]:
        raise InputError(
            f"{file}: {_listed(sources)} cannot be laid on {_listed(targets)}: the numbers of features do not add up"
        )
    for source, start in zip(sources, starts[0], strict=False):
        for target, at in zip(targets, starts[1], strict=False):
            low, high = max(start, at), min(start + (source.features or 0), at + (target.features or 0))
            if low < high:
                columns = _span(low - at, high - at, target), _span(low - start, high - start, source)
                yield Pair(source.site, target.site, columns[0], _SCORE, why, columns[1])


def _offsets(infos: Sequence[SiteInfo]) -> list[int] | None:
    """Where each site starts when they are laid side by side, then where the last ends; None without fixed widths."""
    ends = [0]
    for info in infos:
        if info.features is None:
            return None
        ends.append(ends[-1] + info.features)
    return ends


def _span(start: int, stop: int, info: SiteInfo) -> Columns | None:
    return None if (start, stop) == (0, info.features) else ((start, stop),)


def _listed(infos: Sequence[SiteInfo]) -> str:
    return " + ".join(f"{info.site.name} ({info.features})" for info in infos)
