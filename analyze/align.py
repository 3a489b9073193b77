"""Aligning the tensors of three runs: by prompt and token position, never by step.

A position of a prompt may be computed in a prefill of any length, in a decode step or several times over; it is
compared where each run computed it first. Only positions whose whole prefix of tokens is the same in all runs are
comparable: a free-running target that chose another token is computing something else from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..store.dims import by_position
from ..store.trace import Trace
from .measure import Triple
from .sites import Site

#: Mapped pages are released after about this many bytes, counting each element of a triple as three float32.
_MAPPED_BYTES = 64 << 20
_BYTES_PER_TRIPLE = 12
_FIELDS = """run, prompt, phase, step, call, module, port, slot, dims, position_start, position_count, dtype, shape,
    nbytes, file_offset"""
_CHUNK_QUERY = f"""
SELECT {_FIELDS}, s.path
FROM tensors t JOIN shards s USING (run, rank, shard)
WHERE rank = 0 AND phase <> 'static' AND (run, module, port, slot, call) IN (
    SELECT w.run, w.module, w.port, w.slot, w.call
    FROM (SELECT unnest(?::STRUCT(run VARCHAR, module VARCHAR, port VARCHAR, slot VARCHAR, call INTEGER)[]) AS w))
ORDER BY run, prompt, step, phase DESC
"""  # noqa: S608 (fixed names)


@dataclass(frozen=True)
class Stored:
    """One stored tensor of a site, values unread."""

    prompt: int
    phase: str
    step: int
    dims: str
    position_start: int | None
    position_count: int | None
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    path: str

    @property
    def features(self) -> int:
        """Elements per position, or of the whole tensor without positions."""
        return math.prod(self.shape) // max(self.position_count or 1, 1)

    def rows(self, trace: Trace, columns: tuple[int, int] | None = None) -> npt.NDArray[Any]:
        """The values as `[positions, features]`, mapped from the shard; only some features when asked."""
        values = by_position(trace.values(self.path, self.dtype, self.shape, self.offset, self.nbytes), self.dims)
        return values if columns is None else np.ascontiguousarray(values[:, columns[0] : columns[1]])


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
    for prompt, (length, tokens) in runs[0].items():
        others = []
        for run, used in zip(runs[1:], taken[1:], strict=True):
            same = [p for p, (n, t) in run.items() if p not in used and n == length and t[:n] == tokens[:length]]
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


def _prompt_tokens(trace: Trace, run: str) -> dict[int, tuple[int, tuple[int, ...]]]:
    manifest = trace.manifest(run)
    lengths = {prompt.prompt: prompt.n_tokens for prompt in manifest.prompts}
    return {t.prompt: (lengths.get(t.prompt, len(t.token_ids)), t.token_ids) for t in manifest.tokens}


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def load_sites(trace: Trace, wanted: Iterable[tuple[str, Site]]) -> dict[tuple[str, Site], list[Stored]]:
    """The stored tensors of some sites of some runs, in the order in which positions were computed."""
    keys = [
        {"run": run, "module": site.module, "port": site.port, "slot": site.slot, "call": site.call}
        for run, site in wanted
    ]
    found: dict[tuple[str, Site], list[Stored]] = {}
    for row in trace.query(_CHUNK_QUERY, [keys]).to_pylist():
        site = Site(row["module"], row["port"], row["slot"], row["call"])
        stored = Stored(
            -1 if row["prompt"] is None else row["prompt"],
            row["phase"],
            row["step"],
            row["dims"],
            row["position_start"],
            row["position_count"],
            row["dtype"],
            tuple(row["shape"]),
            row["nbytes"],
            row["file_offset"],
            row["path"],
        )
        found.setdefault((row["run"], site), []).append(stored)
    return found


class AlignedSite:
    """The tensors of one site in three runs for one prompt and one phase; iterating maps them piece by piece."""

    def __init__(
        self,
        trace: Trace,
        pieces: Sequence[tuple[range, tuple[Stored, Stored | None, Stored]]],
        columns: tuple[int, int] | None,
    ) -> None:
        """`pieces` are ranges of positions with the tensors that hold them."""
        self._trace, self._pieces, self._columns = trace, pieces, columns

    @property
    def n_positions(self) -> int:
        """Number of positions (or tensors, for sites without positions) to compare."""
        return sum(len(positions) for positions, _ in self._pieces)

    @property
    def target_dtype(self) -> str:
        """Dtype of the target's tensors by name."""
        return self._pieces[0][1][2].dtype

    def clash(self) -> str | None:
        """Why the tensors cannot be compared element by element, or None."""
        for _, (reference, baseline, target) in self._pieces:
            start, stop = self._columns or (0, target.features)
            if not reference.features == stop - start <= target.features:
                return f"target {_shape(target)} against reference {_shape(reference)}"
            if baseline is not None and baseline.features != reference.features:
                return f"baseline {_shape(baseline)} against reference {_shape(reference)}"
            if len({tensor.dtype.startswith("complex") for tensor in (reference, baseline or reference, target)}) > 1:
                return f"complex and real: target {target.dtype}, reference {reference.dtype}"
        return None

    def __iter__(self) -> Iterator[Triple]:
        """Read the pieces; may be repeated. Mapped pages are given back on the way, so that memory stays bounded."""
        mapped = 0
        for positions, (reference, baseline, target) in self._pieces:
            mapped += len(positions) * reference.features * _BYTES_PER_TRIPLE
            if mapped > _MAPPED_BYTES:
                self._trace.release_pages()
                mapped = 0
            yield Triple(
                _slice(reference, reference.rows(self._trace), positions),
                None if baseline is None else _slice(baseline, baseline.rows(self._trace), positions),
                _slice(target, target.rows(self._trace, self._columns), positions),
                np.arange(positions.start, positions.stop),
            )


def align(
    trace: Trace,
    tensors: Sequence[Sequence[Stored] | None],
    prompts: Sequence[PromptPair],
    columns: tuple[int, int] | None,
) -> Mapping[str, Mapping[int, AlignedSite]]:
    """Align one site.

    Args:
        trace: the trace.
        tensors: stored tensors of the reference, the baseline (None without one) and the target.
        prompts: prompts that the runs share.
        columns: features of the target to compare, None for all.

    Returns:
        For each phase of the target, for each prompt of the reference, what can be compared.
    """
    reference, baseline, target = tensors
    aligned: dict[str, dict[int, AlignedSite]] = {}
    for pair in prompts:
        chosen = [_of_prompt(reference, pair.prompt), _of_prompt(target, pair.target)]
        if baseline is not None and pair.baseline is not None:
            chosen.insert(1, _of_prompt(baseline, pair.baseline))
        for phase, pieces in _pieces(chosen, pair.n_common).items():
            full = [(r, (s[0], s[1] if len(s) == 3 else None, s[-1])) for r, s in pieces]
            aligned.setdefault(phase, {})[pair.prompt] = AlignedSite(trace, full, columns)
    return aligned


def _of_prompt(tensors: Sequence[Stored] | None, prompt: int) -> list[Stored]:
    return [stored for stored in tensors or () if stored.prompt in (prompt, -1)]


def _pieces(runs: Sequence[Sequence[Stored]], limit: int | None) -> dict[str, list[tuple[range, tuple[Stored, ...]]]]:
    """Split the shared positions where any run changes from one tensor to the next."""
    if any(stored.position_start is None for run in runs for stored in run):
        return _whole_tensors(runs)
    owners = [_first_computed(run) for run in runs]
    target_owner = owners[-1]
    shared = sorted(set(target_owner).intersection(*owners[:-1]))
    if limit is not None:
        shared = [position for position in shared if position < limit]
    pieces: dict[str, list[tuple[range, tuple[Stored, ...]]]] = {}
    for start, stop in _runs_of(shared, owners):
        chosen = tuple(owner[start] for owner in owners)
        pieces.setdefault(chosen[-1].phase, []).append((range(start, stop), chosen))
    return pieces


def _first_computed(tensors: Sequence[Stored]) -> dict[int, Stored]:
    owner: dict[int, Stored] = {}
    for stored in tensors:
        start = stored.position_start or 0
        for position in range(start, start + (stored.position_count or 0)):
            owner.setdefault(position, stored)
    return owner


def _runs_of(positions: Sequence[int], owners: Sequence[dict[int, Stored]]) -> Iterator[tuple[int, int]]:
    """Maximal ranges of consecutive positions that stay within one tensor of every run."""
    if not positions:
        return
    start = positions[0]
    for before, after in pairwise(positions):
        if after != before + 1 or any(owner[before] is not owner[after] for owner in owners):
            yield start, before + 1
            start = after
    yield start, positions[-1] + 1


def _whole_tensors(runs: Sequence[Sequence[Stored]]) -> dict[str, list[tuple[range, tuple[Stored, ...]]]]:
    """Tensors without positions are compared whole, those of the same phase and step with each other."""
    by_step = [{(stored.phase, stored.step): stored for stored in run} for run in runs]
    pieces: dict[str, list[tuple[range, tuple[Stored, ...]]]] = {}
    for key in by_step[-1]:
        if all(key in steps for steps in by_step):
            phase, step = key
            pieces.setdefault(phase, []).append((range(step, step + 1), tuple(steps[key] for steps in by_step)))
    return pieces


def _shape(stored: Stored) -> str:
    return f"{list(stored.shape)}" + (f" ({stored.dims})" if stored.dims else "")


def _slice(stored: Stored, rows: npt.NDArray[Any], positions: range) -> npt.NDArray[Any]:
    if stored.position_start is None:
        return rows.reshape(1, rows.size)
    first = positions.start - stored.position_start
    return rows[first : first + len(positions)]
