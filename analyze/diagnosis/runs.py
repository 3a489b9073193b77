"""The runs of a comparison as a diagnosis reads them: aligned values of any site, parameters and the model's config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...store.errors import TraceNotFoundError
from ...store.trace import Trace
from ..align import AlignedSite, PromptPair, Selection, align, match_prompts
from ..loading import load_sites
from ..ranks import Stored
from ..routed_rows import with_tokens
from ..sites import Site, SiteInfo, sites_of
from ..stored_pairs import selection_of
from .config import ModelConfig

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_PARAMETERS = """
SELECT module, slot, port, dtype, shape, file_offset, nbytes, s.path
FROM tensors t JOIN shards s USING (run, rank, shard)
WHERE run = ? AND phase = 'static' AND dataset <> '' ORDER BY rank DESC
"""


@dataclass(frozen=True)
class Rows:
    """Aligned values of one site.

    Attributes:
        prompts, positions: of every row; `int64[n]`. Rows are in order of prompt, then position.
        reference: `float64[n, features]`.
        baseline: the same, None when there is none.
        target: the same, None when the target does not have the site.
    """

    prompts: IntArray
    positions: IntArray
    reference: FloatArray
    baseline: FloatArray | None
    target: FloatArray | None

    def of_prompt(self, prompt: int) -> slice:
        """Where the rows of a prompt are."""
        start, stop = np.searchsorted(self.prompts, [prompt, prompt + 1])
        return slice(int(start), int(stop))


@dataclass(frozen=True)
class Counterpart:
    """What of the target a reference site was compared with."""

    site: Site
    selection: Selection
    identity: bool


class ComparedRuns:
    """Reference, baseline and target of a comparison; values are read when asked for."""

    def __init__(self, trace: Trace, comparison: str) -> None:
        """Read what the catalog knows.

        Raises:
            TraceNotFoundError: there is no such comparison.
        """
        found = trace.query("SELECT * FROM comparisons WHERE comparison = ?", [comparison]).to_pylist()
        if not found:
            known = trace.query("SELECT comparison FROM comparisons ORDER BY created_at").to_pylist()
            names = ", ".join(row["comparison"] for row in known) or "none; make one with 'sleuth compare'"
            raise TraceNotFoundError(f"{trace.path} has no comparison {comparison!r}; its comparisons: {names}")
        row = found[0]
        self.trace, self.comparison = trace, comparison
        self.reference: str = row["reference"]
        self.baseline: str | None = row["baseline"]
        self.target: str = row["target"]
        self.target_dtype = trace.manifest(self.target).dtype
        self.target_ranks = trace.manifest(self.target).tp
        self._stored: dict[tuple[str, Site], list[Stored]] = {}
        self.prompts = match_prompts(trace, self.reference, self.baseline, self.target)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's config, of whichever run kept it."""
        for run in (self.reference, self.baseline, self.target):
            kept = self.trace.manifest(run).provenance.get("config") if run else None
            if isinstance(kept, dict):
                return ModelConfig(kept)
        return ModelConfig({})

    @cached_property
    def sites(self) -> dict[str, SiteInfo]:
        """The reference's sites by name, in execution order."""
        return {info.site.name: info for info in self._sites_of(self.reference)}

    @cached_property
    def target_sites(self) -> dict[str, SiteInfo]:
        """The target's sites by name."""
        return {info.site.name: info for info in self._sites_of(self.target)}

    def _sites_of(self, run: str) -> list[SiteInfo]:
        return with_tokens(self.trace, run, sites_of(self.trace, run))

    @cached_property
    def classes(self) -> dict[str, str]:
        """Class of every module of the reference, by path."""
        return {module.path: module.cls for module in self.trace.manifest(self.reference).modules}

    @cached_property
    def counterparts(self) -> dict[str, tuple[Counterpart, ...]]:
        """Target sites by reference site, those that need no rearranging first."""
        targets = {name: info.site for name, info in self.target_sites.items()}
        rows = self.trace.query(
            "SELECT * FROM mapping_entries WHERE mapping = ? ORDER BY entry", [self.comparison]
        ).to_pylist()
        found: dict[str, list[Counterpart]] = {}
        for row in rows:
            site = targets.get(row["target_sites"][0])
            if site is not None:
                selection = selection_of(row["transform_spec"])
                found.setdefault(row["reference_sites"][0], []).append(
                    Counterpart(site, selection, selection == Selection())
                )
        return {name: tuple(sorted(items, key=lambda item: not item.identity)) for name, items in found.items()}

    @cached_property
    def parameters(self) -> dict[tuple[str, str], FloatArray]:
        """Small parameters of the reference by module path and name."""
        return self._parameters_of(self.reference)

    @cached_property
    def target_parameters(self) -> dict[tuple[str, str], FloatArray]:
        """Small parameters of the target (of its lowest rank) by module path and name."""
        return self._parameters_of(self.target)

    def _parameters_of(self, run: str) -> dict[tuple[str, str], FloatArray]:
        rows = self.trace.query(_PARAMETERS, [run]).to_pylist()
        return {
            (row["module"], row["slot"]): np.asarray(
                self.trace.values(row["path"], row["dtype"], tuple(row["shape"]), row["file_offset"], row["nbytes"])
            ).astype(np.float64)
            for row in rows
            if not row["dtype"].startswith("complex")
        }

    def tokens(self, prompt: int) -> tuple[int, ...]:
        """Token ids of a prompt of the reference; empty when nobody recorded them."""
        return self._tokens.get(prompt, ())

    @cached_property
    def _tokens(self) -> dict[int, tuple[int, ...]]:
        return {tokens.prompt: tokens.token_ids for tokens in self.trace.manifest(self.reference).tokens}

    def prepare(self, site: Site, around: Iterable[Site]) -> None:
        """Look up in one query where a suspect and the sites around it are stored; forgets earlier ones."""
        wanted = [(self.reference, other) for other in (site, *around)]
        for other in (site, *around):
            wanted += [(self.target, item.site) for item in self.counterparts.get(other.name, ())]
        self._stored = {}
        self._index([*wanted, *([(self.baseline, site)] if self.baseline else [])])

    def _index(self, wanted: list[tuple[str, Site]]) -> dict[tuple[str, Site], list[Stored]]:
        """Where the tensors of some sites are stored, asking the catalog for those that are not known yet."""
        missing = [key for key in wanted if key not in self._stored]
        if missing:
            found = load_sites(self.trace, dict.fromkeys(missing))
            self._stored |= {key: found.get(key, []) for key in missing}
        return {key: self._stored[key] for key in wanted}

    def read(
        self, site: Site, counterpart: Counterpart | None, prompts: list[PromptPair], elements: int, phase: str = ""
    ) -> Rows | None:
        """Values of a site on the positions that the runs share.

        Args:
            site: of the reference.
            counterpart: of the target; None reads the reference alone.
            prompts: prompts to read.
            elements: about as many elements of each run are read, then the rest is left out.
            phase: of the target; all by default.

        Returns:
            None when nothing can be compared.
        """
        wanted = [(self.reference, site)]
        if counterpart is not None:
            wanted += [(self.target, counterpart.site)]
            wanted += [(self.baseline, site)] if self.baseline else []
        stored = self._index(wanted)
        reference = stored.get((self.reference, site), [])
        if counterpart is None:
            alone = [PromptPair(pair.prompt, None, pair.prompt, pair.n_common, pair.n_tokens) for pair in prompts]
            aligned = align(self.trace, (reference, None, reference), alone, Selection())
        else:
            baseline = stored.get((self.baseline, site)) if self.baseline else None
            target = stored.get((self.target, counterpart.site), [])
            aligned = align(self.trace, (reference, baseline, target), prompts, counterpart.selection)
        chosen = {name: by_prompt for name, by_prompt in aligned.items() if phase in ("", name)}
        return _gather(chosen, counterpart is not None, elements, _last_axis(reference))


def _last_axis(stored: list[Stored]) -> int | None:
    """Length of the last axis of tensors that are compared whole, when they agree; None for rows of token positions."""
    lengths = {tensor.shape[-1] for tensor in stored if tensor.shape}
    whole = any(tensor.position_start is None for tensor in stored)
    return lengths.pop() if whole and len(lengths) == 1 else None


def _gather(
    aligned: Mapping[str, Mapping[int, AlignedSite]], with_target: bool, elements: int, last_axis: int | None
) -> Rows | None:
    parts: list[tuple[int, IntArray, list[FloatArray | None]]] = []
    left = elements
    for prompt in sorted({prompt for by_prompt in aligned.values() for prompt in by_prompt}):
        for by_prompt in aligned.values():
            site = by_prompt.get(prompt)
            if site is None or site.clash():
                continue
            for triple in site:
                if left <= 0:
                    break
                take = max(1, left // max(triple.reference.shape[1], 1))
                sides = [triple.reference, triple.baseline, triple.target if with_target else None]
                if any(side is not None and side.dtype.kind == "c" for side in sides):
                    return None
                values = [None if side is None else side[:take].astype(np.float64) for side in sides]
                positions = triple.positions[:take]
                if last_axis:
                    values = [None if side is None else side.reshape(-1, last_axis) for side in values]
                    rows = values[0].shape[0] if values[0] is not None else 0
                    positions = np.arange(rows) + len(parts) * rows
                parts.append((prompt, positions, values))
                left -= triple.reference[:take].size
    widths = {rows.shape[1] for _, _, sides in parts for rows in sides if rows is not None}
    if len(widths) != 1:  # none, or sizes that depend on the data
        return None
    prompts = np.concatenate([np.full(len(positions), prompt) for prompt, positions, _ in parts])
    positions = np.concatenate([part[1] for part in parts])
    order = np.lexsort((positions, prompts))
    joined: list[FloatArray | None] = []
    for side in range(3):
        values = [part[2][side] for part in parts]
        present = [rows for rows in values if rows is not None]
        joined.append(np.concatenate(present)[order] if len(present) == len(values) else None)
    if joined[0] is None:
        return None
    return Rows(prompts[order], positions[order], joined[0], joined[1], joined[2])
