"""Errors of replicate runs at the sites of a comparison, token by token.

Two replicates share a pass: one takes the place of the baseline, the other that of the target. So K replicates read
the reference ceil(K / 2) times, and themselves once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ...store.errors import InputError
from ...store.trace import Trace
from ..align import PromptPair, Selection, align, match_prompts
from ..loading import load_sites
from ..measure import measure
from ..pairs import Pair
from ..ranks import Stored
from ..sites import Site
from ..triples import FloatArray, IntArray
from .routing import RoutingLedger

#: Positions, and the sum of squares of an error at each.
TokenSquares: TypeAlias = tuple[IntArray, FloatArray]


@dataclass(frozen=True)
class AtSite:
    """Errors of the replicates at one reference site: for each of them, per prompt."""

    errors: tuple[Mapping[int, TokenSquares], ...]

    def squares(self, replicate: int, prompt: int, positions: IntArray) -> FloatArray:
        """Sums of squares of a replicate's error at these positions; NaN where it has none."""
        found = self.errors[replicate].get(prompt)
        result = np.full(len(positions), np.nan)
        if found is None:
            return result
        places, values = found
        at = np.minimum(np.searchsorted(places, positions), len(places) - 1)
        hit = places[at] == positions
        result[hit] = values[at[hit]]
        return result


class Replicates:
    """The replicate runs of a comparison; holds the errors of one site at a time."""

    def __init__(
        self,
        trace: Trace,
        reference: str,
        runs: Sequence[str],
        routing: RoutingLedger,
        chunks: Sequence[Sequence[Pair]],
    ) -> None:
        """Match the prompts of every two replicates with the reference's.

        Args:
            trace: the trace.
            reference: the reference run.
            runs: the replicates.
            routing: receives their flips.
            chunks: pairs whose index rows are loaded together.
        """
        self._chunks = chunks
        self._stored: dict[tuple[str, Site], list[Stored]] = {}
        self._trace, self._reference, self.runs, self._routing = trace, reference, tuple(runs), routing
        self._couples: list[tuple[str | None, str, list[PromptPair]]] = []
        for first in range(0, len(runs), 2):
            *one, other = runs[first : first + 2]
            before = one[0] if one else None
            self._couples.append((before, other, match_prompts(trace, reference, before, other)))
        self._last: tuple[object, AtSite] | None = None

    def at(self, pair: Pair) -> AtSite:
        """Errors at the reference site of a pair, at the features that the pair compares."""
        key = (pair.reference, pair.reference_columns)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._read(pair))
        return self._last[1]

    def _load(self, site: Site) -> dict[tuple[str, Site], list[Stored]]:
        if (self._reference, site) not in self._stored:
            chunk = next((chunk for chunk in self._chunks if any(pair.reference == site for pair in chunk)), ())
            sites = dict.fromkeys([pair.reference for pair in chunk] or [site])
            wanted = [(run, each) for run in (self._reference, *self.runs) for each in sites]
            self._stored = load_sites(self._trace, wanted)
        return self._stored

    def _read(self, pair: Pair) -> AtSite:
        site = pair.reference
        stored = self._load(site)
        selection = Selection(pair.reference_columns, pair.reference_columns)
        found: dict[str, dict[int, list[TokenSquares]]] = {run: {} for run in self.runs}
        for one, other, prompts in self._couples:
            runs = [stored.get((run, site), []) if run else None for run in (self._reference, one, other)]
            for by_prompt in align(self._trace, runs, prompts, selection).values():
                if any(aligned.clash() for aligned in by_prompt.values()):
                    continue
                self._routing.note(site.module, self._routing.choices(site.module, by_prompt), one, other)
                measured = measure({p: aligned.__iter__ for p, aligned in by_prompt.items()}, quantiles=False)
                for prompt in by_prompt:
                    tokens = measured[prompt].tokens
                    if tokens is not None:
                        found[other].setdefault(prompt, []).append((tokens.positions, tokens.target_sq))
                        if one is not None:
                            found[one].setdefault(prompt, []).append((tokens.positions, tokens.baseline_sq))
        return AtSite(tuple({prompt: _by_position(parts) for prompt, parts in found[run].items()} for run in self.runs))


def check_replicates(trace: Trace, baseline: str | None, runs: Sequence[str]) -> None:
    """Refuse runs that cannot tell how the baseline scatters.

    Raises:
        InputError: there is no baseline, a run is named twice, or it is of another dtype or checkpoint.
        TraceNotFoundError: a run does not exist.
    """
    if runs and baseline is None:
        raise InputError("replicates show how the baseline scatters; name it with --baseline")
    if len(set(runs)) < len(runs):
        raise InputError(f"a replicate is named twice in {', '.join(runs)}; name each run once")
    for run in runs:
        mine, theirs = trace.manifest(run), trace.manifest(baseline or "")
        prints = [manifest.provenance.get("checkpoint_fingerprint") for manifest in (mine, theirs)]
        if mine.dtype != theirs.dtype:
            raise InputError(
                f"replicate {run!r} ran in {mine.dtype}, the baseline in {theirs.dtype}; capture it in {theirs.dtype}"
            )
        if all(prints) and prints[0] != prints[1]:
            raise InputError(f"replicate {run!r} was made from another checkpoint than {baseline!r}; capture it anew")


def _by_position(parts: Sequence[TokenSquares]) -> TokenSquares:
    positions, squares = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(positions, kind="stable")
    return positions[order], squares[order]
