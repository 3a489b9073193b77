"""Sites whose rows are the tokens that a router sent there: experts that are modules of their own.

Such a tensor holds as many rows as the router chose to send, in an order that is the implementation's own, padding
included; which token a row belongs to is nowhere recorded. Where the values of the run prove it (`routed_tokens`), rows
are compared by token, for the tokens that every run sends to that expert. Elsewhere such tensors cannot be compared,
even where their shapes happen to be equal: one exchanged token shifts all rows behind it. The router, the weights it
gives and the experts' block are compared token by token in any case.

They are recognised by what they recorded, not by names: siblings (modules whose paths differ in their last number) are
called with other numbers of rows in the same forward pass, or some are called and earlier ones are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..store.trace import Trace
from .align import PromptPair
from .loading import load_sites
from .pairs import Gap, Pair, SiteMapping
from .ranks import Stored
from .routed_tokens import Expert, Token, routed_block
from .sites import Site, SiteInfo

REASON = (
    "its rows are the tokens that a router sent to it, in an unrecorded order that no values prove; the router and the "
    "experts' block are compared instead"
)
UNSENT = "the {role}'s router sent no token to this expert"
NOTHING_SHARED = "no token was sent to this expert in every run"

# Where a run ended early, the last siblings of its last forward pass are missing: a set of callers that lacks only
# those tells nothing.
_ROUTED = r"""
WITH calls AS (
    SELECT regexp_replace(module, '^((?:.*\.)?)[0-9]+((?:\..*)?)$', '\1*\2') AS family,
           regexp_extract(module, '^(?:.*\.)?([0-9]+)(?:\..*)?$', 1)::BIGINT AS member,
           module, port, slot, call, phase, step, rank, prompt, position_start, shape
    FROM tensors WHERE run = ? AND phase <> 'static' AND regexp_matches(module, '(^|\.)[0-9]+(\.|$)')
), members AS (
    SELECT family, port, slot, call, phase, rank, list_sort(list(DISTINCT member)) AS everyone
    FROM calls GROUP BY ALL
), sizes AS (
    SELECT family, port, slot, call, phase, step, rank, prompt, member,
           list_sort(list(shape[1])) AS n_rows, min(shape[2:]) AS rest, max(shape[2:]) AS other_rest,
           bool_and(position_start IS NULL) AS free
    FROM calls GROUP BY ALL
), passes AS (
    SELECT family, port, slot, call, phase, step, rank, prompt, list_sort(list(member)) AS called,
           bool_and(free) AND count(DISTINCT n_rows) > 1 AND min(rest) = max(other_rest) AS uneven
    FROM sizes GROUP BY ALL
), routed AS (
    SELECT DISTINCT family FROM passes JOIN members USING (family, port, slot, call, phase, rank)
    WHERE uneven OR called <> everyone[1:len(called)]
)
SELECT DISTINCT module FROM calls SEMI JOIN routed USING (family)
"""


def with_tokens(trace: Trace, run: str, infos: Sequence[SiteInfo]) -> list[SiteInfo]:
    """Sites of a run; those of experts whose rows are known by token have positions, and features of one row."""
    manifest = trace.manifest(run)
    by_block: dict[str, list[Site]] = {}
    for info in infos:
        if (expert := Expert.of(info.site.module)) and routed_block(trace, manifest, info.site.module):
            by_block.setdefault(expert.block, []).append(info.site)
    features: dict[Site, int] = {}
    for sites in by_block.values():
        for (_, site), tensors in load_sites(trace, [(run, site) for site in sites]).items():
            if all(stored.held is not None for stored in tensors):
                features[site] = tensors[0].features
    return [
        replace(info, features=features[info.site], positioned=True) if info.site in features else info
        for info in infos
    ]


def without_routed_rows(
    trace: Trace,
    mapping: SiteMapping,
    runs: tuple[str, str | None, str],
    sites: tuple[Sequence[SiteInfo], Sequence[SiteInfo], Sequence[SiteInfo]],
) -> SiteMapping:
    """Account for the pairs of which a side holds the rows of a router's choice, and not by token.

    Args:
        trace: the trace.
        mapping: of the reference and the target.
        runs: names of the reference, of the baseline (or None) and of the target.
        sites: theirs, `with_tokens`.
    """
    unknown = [_without_tokens(trace, run, infos) for run, infos in zip(runs, sites, strict=True) if run is not None]
    reference, target = set[Site]().union(*unknown[:-1]), unknown[-1]
    dropped = {pair: None for pair in mapping.pairs if pair.reference in reference or pair.target in target}
    gaps = dict.fromkeys(Gap(pair.reference, "skipped", REASON) for pair in dropped)
    kept = tuple(pair for pair in mapping.pairs if pair not in dropped)
    return replace(mapping, pairs=kept, gaps=(*mapping.gaps, *gaps))


def without_unsent(trace: Trace, runs: tuple[str, str | None, str], mapping: SiteMapping) -> SiteMapping:
    """Holes at experts to which the baseline's or the target's router sent no token are accounted for."""
    return replace(mapping, gaps=tuple(_unsent(trace, runs, gap) for gap in mapping.gaps))


def _without_tokens(trace: Trace, run: str, infos: Iterable[SiteInfo]) -> set[Site]:
    """Sites of a run that hold the rows of a router's choice and not by token."""
    routed = routed_modules(trace, run)
    return {info.site for info in infos if not info.positioned and _inside(info.site.module, routed)}


def _unsent(trace: Trace, runs: tuple[str, str | None, str], gap: Gap) -> Gap:
    """A hole is none where a router sent no token."""
    expert = Expert.of(gap.site.module)
    for role, run in zip(("baseline", "target"), runs[1:], strict=True):
        if gap.status != "unmatched" or expert is None or run is None:
            continue
        block = routed_block(trace, trace.manifest(run), gap.site.module)
        if block is not None and block.complete and not block.sent(expert.number):
            return Gap(gap.site, "skipped", UNSENT.format(role=role))
    return gap


class SharedTokens:
    """The tokens that the runs of a comparison have in common at experts that are modules of their own."""

    def __init__(self, trace: Trace, runs: tuple[str, str | None, str], prompts: Sequence[PromptPair]) -> None:
        """`runs` are the reference, the baseline (or None) and the target."""
        self._trace = trace
        self._manifests = [None if run is None else trace.manifest(run) for run in runs]
        self._prompts = [
            {pair.prompt: pair.prompt for pair in prompts},
            {pair.baseline: pair.prompt for pair in prompts if pair.baseline is not None},
            {pair.target: pair.prompt for pair in prompts},
        ]

    def of(self, pair: Pair, target: Sequence[Stored]) -> tuple[int, int] | None:
        """How many tokens every run sent to the reference's expert, and how many only the reference did.

        Args:
            pair: of sites.
            target: tensors of the target.

        Returns:
            None where the reference's site is not compared by token of an expert.
        """
        modules = (pair.reference.module, pair.reference.module, pair.target.module)
        sets: list[set[Token]] = []
        for manifest, module, prompts in zip(self._manifests, modules, self._prompts, strict=True):
            block = None if manifest is None else routed_block(self._trace, manifest, module)
            expert = Expert.of(module)
            if block is not None and expert is not None:
                sent = block.sent(expert.number)
            elif sets and manifest is not None and pair.expert is not None and module == pair.target.module:
                parts = [stored.of_expert(self._trace, pair.expert) for stored in target]
                sent = frozenset((stored.prompt, position) for stored in parts for position in stored.positions)
            elif sets:
                continue
            else:
                return None
            sets.append({(prompts[prompt], position) for prompt, position in sent if prompt in prompts})
        shared = sets[0].intersection(*sets[1:])
        return len(shared), len(sets[0]) - len(shared)


def routed_modules(trace: Trace, run: str) -> set[str]:
    """Modules of a run that were given the tokens of a router's choice; what they contain is not listed."""
    return {row["module"] for row in trace.query(_ROUTED, [run]).to_pylist()}


def _inside(module: str, routed: set[str]) -> bool:
    """Whether a module is one of these, or part of one."""
    if not routed:
        return False
    parts = module.split(".")
    return any(".".join(parts[:end]) in routed for end in range(1, len(parts) + 1))
