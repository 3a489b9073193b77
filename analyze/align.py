"""Aligning the tensors of three runs: by prompt and token position, never by step.

A position of a prompt may be computed in a prefill of any length, in a decode step or several times over; it is
compared where each run computed it first. Only positions whose whole prefix of tokens is the same in all runs are
comparable: a free-running target that chose another token is computing something else from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..store.manifest import ENCODE, ENCODER_TOKENS
from ..store.trace import Trace
from .measure import Triple
from .ranks import Columns, Stored

#: Mapped pages are released after about this many bytes, counting each element of a triple as three float32.
_MAPPED_BYTES = 64 << 20
_BYTES_PER_TRIPLE = 12
#: Elements of each run that are mapped or put together at a time.
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class PromptPair:
    """A prompt of the reference and the same prompt in the other runs.

    Attributes:
        prompt: index in the reference.
        baseline: index in the baseline, None without one.
        target: index in the target.
        n_common: number of leading positions whose tokens agree in all runs; None when nobody recorded tokens.
        n_tokens: number of positions that all runs recorded.
    """

    prompt: int
    baseline: int | None
    target: int
    n_common: int | None
    n_tokens: int


def match_prompts(trace: Trace, reference: str, baseline: str | None, target: str) -> list[PromptPair]:
    """Find the reference's prompts in the other runs by their tokens.

    Runs without tokens (plain modules, imported tensors) are matched by prompt index.
    """
    runs = [_prompt_tokens(trace, run) for run in (reference, baseline, target) if run is not None]
    if not all(runs):
        return [PromptPair(0, None if baseline is None else 0, 0, None, 0)]
    pairs = []
    taken: list[set[int]] = [set() for _ in runs]
    for prompt, (length, tokens, source) in runs[0].items():
        others = []
        for run, used in zip(runs[1:], taken[1:], strict=True):
            known = {p: (n, t[:n], s) for p, (n, t, s) in run.items() if p not in used}
            same = [p for p, found in known.items() if found == (length, tokens[:length], source)]
            if not same:
                break
            others.append(same[0])
            used.add(same[0])
        else:
            sequences = [tokens, *(run[index][1] for run, index in zip(runs[1:], others, strict=True))]
            common = _common_prefix(sequences)
            shortest = min(len(sequence) for sequence in sequences)
            pairs.append(PromptPair(prompt, others[0] if baseline else None, others[-1], common, shortest))
    return pairs


def _prompt_tokens(trace: Trace, run: str) -> dict[int, tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """By prompt: its length, its tokens and those that follow, and what the encoder of an encoder-decoder reads."""
    manifest = trace.manifest(run)
    lengths = {prompt.prompt: prompt.n_tokens for prompt in manifest.prompts}
    sources = dict(enumerate(manifest.provenance.get(ENCODER_TOKENS, ())))
    return {
        t.prompt: (lengths.get(t.prompt, len(t.token_ids)), t.token_ids, tuple(sources.get(t.prompt, ())))
        for t in manifest.tokens
    }


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


@dataclass(frozen=True)
class Selection:
    """Which features of two sites correspond: ranges of the reference and of the target, None for all.

    `expert` is the one that is meant where the target holds values of every token's chosen experts.
    """

    reference: Columns | None = None
    target: Columns | None = None
    expert: int | None = None


class AlignedSite:
    """The tensors of one site in three runs for one prompt and one phase; iterating maps them piece by piece."""

    def __init__(
        self,
        trace: Trace,
        pieces: Sequence[tuple[Sequence[int], tuple[Stored, Stored | None, Stored]]],
        selection: Selection,
    ) -> None:
        """`pieces` are ascending positions with the tensors that hold them."""
        self._trace, self._pieces, self._selection = trace, pieces, selection

    @property
    def n_positions(self) -> int:
        """Number of positions (or tensors, for sites without positions) to compare."""
        return sum(len(positions) for positions, _ in self._pieces)

    @property
    def positioned(self) -> bool:
        """Whether rows are token positions; otherwise they are whole tensors."""
        return self._pieces[0][1][2].position_start is not None

    @property
    def target_dtype(self) -> str:
        """Dtype of the target's tensors by name."""
        return self._pieces[0][1][2].dtype

    def clash(self) -> str | None:
        """Why the tensors cannot be compared element by element, or None."""
        chosen = self._selection
        for _, (reference, baseline, target) in self._pieces:
            if _width(reference, chosen.reference) != _width(target, chosen.target):
                return f"target {_shape(target)} against reference {_shape(reference)}"
            if baseline is not None and baseline.features != reference.features:
                return f"baseline {_shape(baseline)} against reference {_shape(reference)}"
            if len({tensor.dtype.startswith("complex") for tensor in (reference, baseline or reference, target)}) > 1:
                return f"complex and real: target {target.dtype}, reference {reference.dtype}"
        return None

    def __iter__(self) -> Iterator[Triple]:
        """Read the pieces; may be repeated. Mapped pages are given back on the way, so that memory stays bounded."""
        mapped = 0
        chosen = self._selection
        for positions, (reference, baseline, target) in self._small_pieces():
            mapped += len(positions) * reference.features * _BYTES_PER_TRIPLE
            if mapped > _MAPPED_BYTES:
                self._trace.release_pages()
                mapped = 0
            yield Triple(
                reference.rows(self._trace, positions, chosen.reference),
                None if baseline is None else baseline.rows(self._trace, positions, chosen.reference),
                target.rows(self._trace, positions, chosen.target),
                np.asarray(positions, np.int64),
            )

    def _small_pieces(self) -> Iterator[tuple[Sequence[int], tuple[Stored, Stored | None, Stored]]]:
        """The pieces, cut so that each maps or copies a bounded amount."""
        for positions, tensors in self._pieces:
            size = max(1, _PIECE_ELEMENTS // max(tensors[0].features, tensors[2].features, 1))
            step = size if tensors[2].position_start is not None else max(len(positions), 1)
            for start in range(0, len(positions), step):
                yield positions[start : start + step], tensors


def align(
    trace: Trace,
    tensors: Sequence[Sequence[Stored] | None],
    prompts: Sequence[PromptPair],
    selection: Selection,
) -> Mapping[str, Mapping[int, AlignedSite]]:
    """Align one site.

    Args:
        trace: the trace.
        tensors: stored tensors of the reference, the baseline (None without one) and the target.
        prompts: prompts that the runs share.
        selection: features to compare.

    Returns:
        For each phase of the target, for each prompt of the reference, what can be compared.
    """
    reference, baseline, target = tensors
    if selection.expert is not None:
        target = [stored.of_expert(trace, selection.expert) for stored in target or ()]
    aligned: dict[str, dict[int, AlignedSite]] = {}
    for pair in prompts:
        chosen = [_of_prompt(reference, pair.prompt), _of_prompt(target, pair.target)]
        if baseline is not None and pair.baseline is not None:
            chosen.insert(1, _of_prompt(baseline, pair.baseline))
        for phase, pieces in _pieces(chosen, pair.n_common, whole=selection == Selection()).items():
            full = [(r, (s[0], s[1] if len(s) == 3 else None, s[-1])) for r, s in pieces]
            aligned.setdefault(phase, {})[pair.prompt] = AlignedSite(trace, full, selection)
    return aligned


def _of_prompt(tensors: Sequence[Stored] | None, prompt: int) -> list[Stored]:
    return [stored for stored in tensors or () if stored.prompt in (prompt, -1)]


def _pieces(
    runs: Sequence[Sequence[Stored]], limit: int | None, *, whole: bool
) -> dict[str, list[tuple[Sequence[int], tuple[Stored, ...]]]]:
    """Split the shared positions where any run changes from one tensor to the next."""
    if any(stored.position_start is None for run in runs for stored in run):
        return _whole_tensors(runs, whole=whole)
    owners = [_first_computed(run) for run in runs]
    target_owner = owners[-1]
    shared = sorted(set(target_owner).intersection(*owners[:-1]))
    if limit is not None:
        shared = [p for p in shared if p < limit or target_owner[p].phase == ENCODE]
    pieces: dict[str, list[tuple[Sequence[int], tuple[Stored, ...]]]] = {}
    scattered = any(stored.held is not None for run in runs for stored in run)
    for positions in _by_owners(shared, owners) if scattered else _runs_of(shared, owners):
        chosen = tuple(owner[positions[0]] for owner in owners)
        pieces.setdefault(chosen[-1].phase, []).append((positions, chosen))
    return pieces


def _first_computed(tensors: Sequence[Stored]) -> dict[int, Stored]:
    owner: dict[int, Stored] = {}
    for stored in tensors:
        for position in stored.positions:
            owner.setdefault(position, stored)
    return owner


def _by_owners(positions: Sequence[int], owners: Sequence[dict[int, Stored]]) -> Iterable[Sequence[int]]:
    """Positions with gaps, those together that the same tensors hold."""
    together: dict[tuple[int, ...], list[int]] = {}
    for position in positions:
        together.setdefault(tuple(id(owner[position]) for owner in owners), []).append(position)
    return together.values()


def _runs_of(positions: Sequence[int], owners: Sequence[dict[int, Stored]]) -> Iterator[range]:
    """Maximal ranges of consecutive positions that stay within one tensor of every run."""
    if not positions:
        return
    start = positions[0]
    for before, after in pairwise(positions):
        if after != before + 1 or any(owner[before] is not owner[after] for owner in owners):
            yield range(start, before + 1)
            start = after
    yield range(start, positions[-1] + 1)


def _whole_tensors(
    runs: Sequence[Sequence[Stored]], *, whole: bool
) -> dict[str, list[tuple[Sequence[int], tuple[Stored, ...]]]]:
    """Tensors without positions are compared whole, those of the same phase and step with each other.

    Where sizes depend on the data (the tokens routed to an expert) and all features are compared, steps in which the
    runs differ in size are left out: their elements do not correspond.
    """
    by_step = [{(s.phase, s.step): replace(s, position_start=None, position_count=None) for s in run} for run in runs]
    varying = whole and any(len({stored.features for stored in steps.values()}) > 1 for steps in by_step)
    pieces: dict[str, list[tuple[Sequence[int], tuple[Stored, ...]]]] = {}
    for key in by_step[-1]:
        if not all(key in steps for steps in by_step):
            continue
        tensors = tuple(steps[key] for steps in by_step)
        if varying and len({stored.features for stored in tensors}) > 1:
            continue
        phase, step = key
        pieces.setdefault(phase, []).append((range(step, step + 1), tensors))
    return pieces


def _width(stored: Stored, columns: Columns | None) -> int:
    """Features that are compared, -1 when the tensor does not have the ones asked for."""
    if columns is None:
        return stored.features
    inside = all(0 <= start <= stop <= stored.features for start, stop in columns)
    return sum(stop - start for start, stop in columns) if inside else -1


def _shape(stored: Stored) -> str:
    return f"{list(stored.shape)}" + (f" ({stored.dims})" if stored.dims else "")
