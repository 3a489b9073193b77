"""Which sites hold the logits of a comparison, and which positions they share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...store.errors import InputError, TraceNotFoundError
from ...store.manifest import RunManifest
from ...store.trace import Trace
from ..align import AlignedSite, PromptPair, Selection, align, match_prompts
from ..loading import load_sites
from ..naming import MAIN_SLOTS
from ..ranks import Columns, Stored
from ..sites import Site, SiteInfo, sites_of
from ..verdict import Thresholds

#: Last names of modules that compute logits.
_HEADS = ("lm_head", "embed_out", "output_layer", "output_projection")


@dataclass(frozen=True)
class ComparedRuns:
    """A stored comparison: its runs and thresholds."""

    comparison: str
    reference: str
    baseline: str | None
    target: str
    thresholds: Thresholds


@dataclass(frozen=True)
class LogitSites:
    """Where the logits are.

    Attributes:
        reference: site of the reference, and of the baseline.
        target: site of the target.
        columns: the target's features that are the reference's vocabulary, None for all.
        vocabulary: size of the reference's.
        n_padded: features of the target beyond it.
        is_root: the target's site is what the model hands out, not what a later mask may still change.
    """

    reference: Site
    target: Site
    columns: Columns | None
    vocabulary: int
    n_padded: int
    is_root: bool


@dataclass(frozen=True)
class SharedPositions:
    """How many positions of a prompt have logits, and where.

    Attributes:
        prompt: index in the reference.
        compared: positions with logits in all runs, after the same tokens.
        reference_only: positions without logits in the target (or the baseline).
        decode_lacking: those of them that the reference computed after the prompt.
        target_only: positions without logits in the reference.
        apart: positions left out since the runs had fed different tokens.
    """

    prompt: int
    compared: int
    reference_only: int
    decode_lacking: int
    target_only: int
    apart: int


@dataclass(frozen=True)
class AlignedLogits:
    """The logits of a comparison, unread.

    Attributes:
        sites: where they come from.
        prompts: prompts that the runs share.
        phases: by phase of the target and prompt of the reference.
        padding: the target's padded features in the same order, empty without any.
        positions: what is shared, per prompt.
        dtype: dtype that the target computes logits in.
    """

    sites: LogitSites
    prompts: tuple[PromptPair, ...]
    phases: Mapping[str, Mapping[int, AlignedSite]]
    padding: Mapping[str, Mapping[int, AlignedSite]]
    positions: tuple[SharedPositions, ...]
    dtype: str


def runs_of(trace: Trace, comparison: str) -> ComparedRuns:
    """The runs of a stored comparison.

    Raises:
        TraceNotFoundError: the trace has no such comparison.
    """
    rows = trace.query("SELECT * FROM comparisons ORDER BY created_at, comparison").to_pylist()
    for row in rows:
        if row["comparison"] == comparison:
            known = Thresholds.__dataclass_fields__
            limits = {key: value for key, value in json.loads(row["thresholds"]).items() if key in known}
            return ComparedRuns(comparison, row["reference"], row["baseline"], row["target"], Thresholds(**limits))
    names = ", ".join(row["comparison"] for row in rows) or "none"
    raise TraceNotFoundError(
        f"{trace.path} has no comparison {comparison!r} (it has: {names}); make one with 'sleuth compare {trace.path}'"
    )


def aligned_logits(trace: Trace, runs: ComparedRuns, site: str | None = None) -> AlignedLogits:
    """Find and align the logits of a comparison.

    Args:
        trace: the trace.
        runs: the comparison.
        site: name of the site of the reference or the target that holds them; found by itself if not given.

    Raises:
        InputError: no site holds logits, several may, or the target's vocabulary is smaller.
    """
    sites = _find(trace, runs, site)
    wanted = [(runs.reference, sites.reference), (runs.target, sites.target)]
    if runs.baseline is not None:
        wanted.insert(1, (runs.baseline, sites.reference))
    stored = load_sites(trace, wanted)
    reference, target = stored.get(wanted[0], []), stored.get(wanted[-1], [])
    baseline = stored.get(wanted[1], []) if runs.baseline is not None else None
    _check_positions(runs, (reference, baseline, target))
    prompts = match_prompts(trace, runs.reference, runs.baseline, runs.target)
    tensors = (reference, baseline, target)
    phases = align(trace, tensors, prompts, Selection(None, sites.columns))
    padding: Mapping[str, Mapping[int, AlignedSite]] = {}
    if 0 < sites.n_padded <= sites.vocabulary:
        beyond = ((sites.vocabulary, sites.vocabulary + sites.n_padded),)
        padding = align(trace, tensors, prompts, Selection(((0, sites.n_padded),), beyond))
    for by_prompt in phases.values():
        for aligned in by_prompt.values():
            if clash := aligned.clash():
                raise InputError(f"logits {sites.reference.name} cannot be compared: {clash}; name others with --site")
    lengths = {prompt.prompt: prompt.n_tokens for prompt in trace.manifest(runs.reference).prompts}
    positions = [
        _shared(pair, (reference, baseline, target), lengths.get(pair.prompt), _compared(phases, pair.prompt))
        for pair in prompts
    ]
    dtype = _computed_in(trace.manifest(runs.target), target)
    return AlignedLogits(sites, tuple(prompts), phases, padding, tuple(positions), dtype)


def _find(trace: Trace, runs: ComparedRuns, wanted: str | None) -> LogitSites:
    reference = {info.site.name: info for info in sites_of(trace, runs.reference)}
    target = {info.site.name: info for info in sites_of(trace, runs.target)}
    pairs = trace.query(
        """SELECT reference_sites[1] AS reference, target_sites[1] AS target, transform_spec FROM mapping_entries
           JOIN comparisons USING (mapping) WHERE comparison = ? ORDER BY entry""",
        [runs.comparison],
    ).to_pylist()
    rows = [row for row in pairs if row["reference"] in reference and row["target"] in target]
    if wanted is not None:
        chosen = [row for row in rows if wanted in (row["reference"], row["target"])]
        if not chosen:
            raise InputError(_unpaired(trace, runs, wanted))
    else:
        chosen = _likeliest(rows, reference, _vocabulary(trace.manifest(runs.reference)))
        if not chosen:
            raise InputError(
                f"comparison {runs.comparison!r} pairs no site of logits (the root's output, lm_head); capture it in "
                "every run, or name the site with --site"
            )
    row = _only(chosen, reference, target)
    return _sites(row, reference[row["reference"]], target[row["target"]], runs)


def _likeliest(
    rows: Sequence[Mapping[str, Any]], infos: Mapping[str, SiteInfo], vocabulary: int | None
) -> list[Mapping[str, Any]]:
    """What the root hands out, else a head, else the last site as wide as the vocabulary."""

    def fitting(row: Mapping[str, Any], where: str) -> bool:
        info = infos[row["reference"]]
        if info.site.port != "output" or (info.features or 0) < (vocabulary or 1):
            return False
        leaf = info.site.module.rpartition(".")[2]
        main = info.site.slot in (*MAIN_SLOTS, "logits")
        return main and (info.site.module == "" if where == "root" else leaf in _HEADS)

    for where in ("root", "head"):
        if found := [row for row in rows if fitting(row, where)]:
            return found
    wide = [row for row in rows if vocabulary is not None and infos[row["reference"]].features == vocabulary]
    last = max(wide, key=lambda row: infos[row["reference"]].exec_order, default=None)
    return [row for row in wide if last is not None and row["reference"] == last["reference"]]


def _only(
    rows: Sequence[Mapping[str, Any]], reference: Mapping[str, SiteInfo], target: Mapping[str, SiteInfo]
) -> Mapping[str, Any]:
    """The one pair that is meant: sites with equal content are one, and a root's output counts before a head's."""
    if len({reference[row["reference"]].content for row in rows}) > 1:
        names = ", ".join(sorted({row["reference"] for row in rows}))
        raise InputError(f"several sites of the reference may hold the logits: {names}; name one with --site")
    roots = [row for row in rows if target[row["target"]].site.module == ""]
    rows = roots or rows
    if len({target[row["target"]].content for row in rows}) > 1:
        names = ", ".join(sorted({row["target"] for row in rows}))
        raise InputError(f"several sites of the target may hold the logits: {names}; name one with --site")
    return rows[0]


def _sites(row: Mapping[str, Any], reference: SiteInfo, target: SiteInfo, runs: ComparedRuns) -> LogitSites:
    vocabulary, width = reference.features, target.features
    if not vocabulary or not width:
        raise InputError(f"{row['reference']} differs in width from tensor to tensor: it holds no logits; name --site")
    if row["transform_spec"] is not None and "reference" in json.loads(row["transform_spec"]):
        raise InputError(f"{row['target']} holds only a part of the vocabulary; capture every rank, or name --site")
    if width < vocabulary:
        raise InputError(
            f"{row['target']} of run {runs.target!r} has {width} logits, {row['reference']} of run {runs.reference!r} "
            f"{vocabulary}: a part of the vocabulary is missing; capture every rank, or name another site with --site"
        )
    padded = width - vocabulary
    columns = ((0, vocabulary),) if padded else None
    return LogitSites(reference.site, target.site, columns, vocabulary, padded, target.site.module == "")


def _unpaired(trace: Trace, runs: ComparedRuns, wanted: str) -> str:
    rows = trace.query(
        "SELECT status, reason FROM coverage WHERE comparison = ? AND site = ?", [runs.comparison, wanted]
    ).to_pylist()
    why = f" ({rows[0]['status']}: {rows[0]['reason']})" if rows else ""
    return f"comparison {runs.comparison!r} pairs no site {wanted!r}{why}; 'sleuth map' shows what it pairs"


def _vocabulary(manifest: RunManifest) -> int | None:
    config = manifest.provenance.get("config")
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    sizes = [part.get("vocab_size") for part in (config, text) if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _check_positions(runs: ComparedRuns, tensors: Iterable[Sequence[Stored] | None]) -> None:
    names = [runs.reference, runs.baseline, runs.target]
    for name, stored in zip(names, tensors, strict=True):
        if stored and any(item.position_start is None for item in stored):
            raise InputError(
                f"the logits of run {name!r} have no token positions; record it with its tokens "
                "(sleuth capture, or sleuth import --tokens)"
            )


def _compared(phases: Mapping[str, Mapping[int, AlignedSite]], prompt: int) -> int:
    return sum(by_prompt[prompt].n_positions for by_prompt in phases.values() if prompt in by_prompt)


def _shared(
    pair: PromptPair, tensors: tuple[Sequence[Stored], Sequence[Stored] | None, Sequence[Stored]],
    length: int | None, compared: int,
) -> SharedPositions:  # fmt: skip
    reference, target = _positions(tensors[0], pair.prompt), _positions(tensors[2], pair.target)
    others = target
    if tensors[1] is not None and pair.baseline is not None:
        others = target & _positions(tensors[1], pair.baseline)
    lacking = reference - others
    decode = {position for position in lacking if length is not None and position >= length}
    n_apart = len(reference & others) - compared
    return SharedPositions(pair.prompt, compared, len(lacking), len(decode), len(target - reference), n_apart)


def _positions(tensors: Sequence[Stored], prompt: int) -> set[int]:
    found: set[int] = set()
    for stored in tensors:
        if stored.prompt in (prompt, -1) and stored.position_start is not None:
            found.update(range(stored.position_start, stored.position_start + (stored.position_count or 0)))
    return found


def _computed_in(manifest: RunManifest, tensors: Sequence[Stored]) -> str:
    """The stored dtype, or the run's if logits were widened after they had been rounded to it."""
    stored = tensors[0].dtype if tensors else manifest.dtype
    narrow = manifest.dtype in ("bfloat16", "float16") and stored in ("float32", "float64")
    return manifest.dtype if narrow else stored
