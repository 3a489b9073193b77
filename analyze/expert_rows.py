"""Which token each row of an expert belongs to, proven from the values of one forward pass.

An expert that is a module of its own is given the tokens that a router sent there, as rows whose order nobody
recorded. Two things are known: the router's scores, hence the experts of every token, and the sum that the block
makes of its experts' rows. Implementations list a token's rows by the rank of the expert among the token's choices,
then by token, some by token alone; that is where the search starts, and the sums decide:

    output[t] = sum_j w[t, j] * rows[expert(t, j)][row(t, j)]     within rounding, for some weights w[t, j]

The weights are fitted by least squares, so that nothing is assumed about how a router normalises its scores; wrong
rows leave nearly all of the output unexplained, since the features outnumber the weights by far.

Experts also hold rows of tokens that were not stored, padding above all. Each row is therefore sought in a window:
at least as many rows lie before it as known tokens, at most that and all rows too many. A token whose sum fits one
choice only closes its windows and narrows those before and behind it. Tokens with tied scores are in no order; they
are sought among the rows that are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from .triples import FloatArray, IntArray

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]

#: Combinations of rows that are tried for one token.
_COMBINATIONS = 4096
#: Combinations without a result after which a call is given up: its output is something else.
_WASTE = 1 << 14
#: Elements that are widened to float64 at a time.
_ELEMENTS = 1 << 22
#: Scores this close may be ordered otherwise by a softmax in float32.
_TIE = 1e-6
#: Share of the norms summed up that a row must have to be proven, in units of what rounding may leave of the sum.
_WEIGHTY = 8.0
#: Row of a token for which the values leave several.
_NOWHERE = -1
#: Features per fitted weight from which an equality proves something.
_EVIDENCE = 4


@dataclass(frozen=True)
class BlockCall:
    """What one call of a mixture of experts left behind; T tokens, E experts, H features.

    Attributes:
        scores: `[T, E]`, of the router; the `chosen` largest are the token's experts.
        output: `[T, H]`, what the block returned.
        rows: by expert, `[rows, H]`, what it returned; an expert without rows was not called.
        chosen: experts per token.
        rounding: unit roundoff of the block's dtype.
        beside: `[T, n, H]`, what the block adds beside its routed experts.
    """

    scores: FloatArray
    output: Array
    rows: Mapping[int, Array]
    chosen: int
    rounding: float
    beside: Array | None = None


@dataclass(frozen=True)
class TokenRows:
    """By expert: the row of every token for which it is proven, and the tokens that the router surely sent there.

    Tokens of which the expert's row is unknown and hardly counts are in neither.
    """

    row: Mapping[int, Mapping[int, int]]
    sent: Mapping[int, frozenset[int]]

    @property
    def n_proven(self) -> int:
        """Rows whose token is known."""
        return sum(map(len, self.row.values()))


def find_rows(call: BlockCall) -> TokenRows:
    """Assign rows to tokens; a token whose output its experts' rows do not explain is left out."""
    by_choice = _searched(call, by_choice=True)
    n_rows = sum(map(len, call.rows.values()))
    if 2 * by_choice.n_proven >= n_rows:
        return by_choice
    by_token = _searched(call, by_choice=False)
    return by_token if by_token.n_proven > by_choice.n_proven else by_choice


def _searched(call: BlockCall, *, by_choice: bool) -> TokenRows:
    search = _Search(call, by_choice=by_choice)
    search.by_order()
    search.by_values()
    search.undisputed()
    return TokenRows(search.proven, search.sent)


class _Search:
    """State of the search: a window of rows per token and choice, closed where low equals high."""

    def __init__(self, call: BlockCall, *, by_choice: bool) -> None:
        self._call, self._by_choice = call, by_choice
        self._order = np.argsort(-call.scores, axis=1, kind="stable")
        ranked = np.take_along_axis(call.scores, self._order, axis=1)
        gaps = ranked[:, : call.chosen] - ranked[:, 1 : call.chosen + 1]
        self._near = np.maximum(1.0, np.abs(ranked[:, : call.chosen])) * _TIE
        self._tied: BoolArray = np.any(gaps <= self._near, axis=1)
        self._experts = self._order[:, : call.chosen]
        self.low = np.full(self._experts.shape, -1)
        self.high = np.full(self._experts.shape, -2)
        self._lists: dict[int, IntArray] = {}
        self.proven: dict[int, dict[int, int]] = {expert: {} for expert in call.rows}
        self.sent: dict[int, frozenset[int]] = {}
        self._wasted = 0
        self._light: dict[int, dict[int, int]] = {expert: {} for expert in call.rows}
        self._disputed: set[int] = set()
        self._open(range(call.scores.shape[1]))

    def _open(self, experts: Sequence[int]) -> None:
        """List every expert's tokens in the expected order, with a window for each."""
        for expert in experts:
            tokens, choices = np.nonzero(np.equal(self._experts, expert) & ~self._tied[:, None])
            order = np.lexsort((tokens, choices) if self._by_choice else (choices, tokens))
            listed = np.stack([tokens[order], choices[order]], axis=1)
            surplus = len(self._call.rows.get(expert, ())) - len(listed)
            self._lists[expert] = listed
            self.sent[expert] = frozenset(tokens.tolist()) if surplus >= 0 else frozenset()
            if surplus < 0:  # fewer were sent than the scores say: their order tells nothing
                self._disputed.add(expert)
            else:
                self.low[listed[:, 0], listed[:, 1]] = np.arange(len(listed))
                self.high[listed[:, 0], listed[:, 1]] = np.arange(len(listed)) + surplus

    def by_order(self) -> None:
        """Prove the tokens whose windows are closed, then close more, the tokens with the fewest choices first."""
        tried = self._tied.copy()
        while True:
            sizes = (self.high - self.low + 1).clip(0)
            n_ways = sizes.astype(np.float64).prod(axis=1)
            closed = np.flatnonzero((n_ways == 1) & ~tried)
            self._verify(closed)
            tried[closed] = True
            waiting = np.flatnonzero((n_ways > 1) & (n_ways <= _COMBINATIONS) & ~tried)
            if not len(waiting) or self._wasted > _WASTE:
                return
            token = int(waiting[np.argmin(n_ways[waiting])])
            windows = [range(*span) for span in zip(self.low[token], self.high[token] + 1, strict=True)]
            tried[token] = True
            self._settle(token, self._experts[token], windows)

    def by_values(self) -> None:
        """Seek the tokens that are in no known order, or not where the order says, among the rows that are left."""
        for token in range(len(self._call.scores)):
            if self._wasted > _WASTE:
                return
            for experts in self._candidates(token):
                known = [self.proven.get(expert, {}) for expert in experts]
                if all(token in rows for rows in known):
                    break
                windows = [
                    [rows[token]] if token in rows else self._free(expert)
                    for expert, rows in zip(experts, known, strict=True)
                ]
                if 0 < math.prod(map(len, windows)) <= _COMBINATIONS and self._settle(token, experts, windows):
                    break

    def undisputed(self) -> None:
        """Take rows of small weight where the order says, at experts whose order every other token confirms.

        Those that remain are not missed: what the block makes of them is within its rounding.
        """
        for expert, rows in self._light.items():
            taken = {_NOWHERE, *self.proven[expert].values()}
            for token, row in rows.items():
                if token in self.proven[expert]:
                    continue
                if expert not in self._disputed and row not in taken:
                    self._accept_one(token, expert, row)
                else:
                    self.sent[expert] -= {token}

    def _candidates(self, token: int) -> Iterator[Sequence[int]]:
        """The sets of experts that a token may have been sent to: several where scores tie at the last choice."""
        scores = self._call.scores[token]
        last, near = scores[self._experts[token, -1]], self._near[token, -1]
        if not self._tied[token]:
            yield self._experts[token].tolist()
            return
        sure = np.flatnonzero(scores > last + near).tolist()
        equal = np.flatnonzero(np.abs(scores - last) <= near).tolist()
        yield from ([*sure, *some] for some in combinations(equal, self._call.chosen - len(sure)))

    def _free(self, expert: int) -> list[int]:
        taken = set(self.proven.get(expert, {}).values())
        return [row for row in range(len(self._call.rows.get(expert, ()))) if row not in taken]

    def _verify(self, tokens: IntArray) -> None:
        """Prove the tokens whose only choice of rows explains their output."""
        if not len(tokens):
            return
        width = self._call.output.shape[1]
        size = max(1, _ELEMENTS // (width * self._call.chosen))
        for start in range(0, len(tokens), size):
            some = tokens[start : start + size]
            stacked = np.stack([self._rows(token, self._experts[token], self.low[token]) for token in some])
            fits, weighty = self._explained(some, stacked)
            for token, fit, known in zip(some.tolist(), fits, weighty, strict=True):
                experts, rows = self._experts[token].tolist(), self.low[token].tolist()
                if not fit:
                    self._disputed.update(experts)
                    continue
                for expert, row, enough in zip(experts, rows, known, strict=False):
                    if enough:
                        self._accept_one(token, expert, row)
                    else:
                        self._light[expert][token] = row

    def _rows(self, token: int, experts: Sequence[int] | IntArray, rows: Sequence[int] | IntArray) -> FloatArray:
        """`[chosen + beside, H]` of one token."""
        own = np.stack([self._call.rows[int(e)][int(r)] for e, r in zip(experts, rows, strict=True)])
        found: FloatArray = own.astype(np.float64)
        if self._call.beside is not None:
            found = np.concatenate([found, self._call.beside[token].astype(np.float64)])
        return found

    def _explained(self, tokens: IntArray, stacked: FloatArray) -> tuple[BoolArray, BoolArray]:
        """Whether rows `[tokens, n, H]` sum up to the outputs for some weights, within rounding.

        Returns:
            That, `[tokens]`, and which of the rows the output depends on by more than rounding, `[tokens, n]`.
        """
        n, width = stacked.shape[1:]
        if width < _EVIDENCE * n:
            return np.zeros(len(tokens), bool), np.zeros((len(tokens), n), bool)
        output = self._call.output[tokens].astype(np.float64)
        gram = stacked @ stacked.swapaxes(1, 2)
        weights = np.linalg.pinv(gram, rcond=1e-13, hermitian=True) @ (stacked @ output[..., None])
        left = np.linalg.norm(output - (weights * stacked).sum(axis=1), axis=1)
        parts = np.abs(weights[..., 0]) * np.linalg.norm(stacked, axis=2)
        allowed = self._tolerance(n) * parts.sum(axis=1)
        fits = (left <= allowed) & np.isfinite(left) & (allowed > 0)
        return np.asarray(fits), np.asarray(parts > _WEIGHTY * allowed[:, None])

    def _tolerance(self, n: int) -> float:
        """What rounding leaves of a sum of n products relative to the sum of their norms: n + 1 random roundings."""
        return self._call.rounding * math.sqrt(n + 1)

    def _settle(self, token: int, experts: Sequence[int] | IntArray, windows: Sequence[Sequence[int]]) -> bool:
        """Try every combination of rows of one token; returns whether some explain its output.

        A row that is the same in all that do is proven; of others that are equal to each other, the first is taken.
        """
        values = [self._call.rows[int(e)][list(w)].astype(np.float64) for e, w in zip(experts, windows, strict=True)]
        ways = np.indices([len(window) for window in windows]).reshape(len(windows), -1)
        fitting: list[IntArray] = []
        known = np.ones(len(windows), bool)
        size = max(1, _ELEMENTS // (self._call.output.shape[1] * len(windows)))
        for start in range(0, ways.shape[1], size):
            some = ways[:, start : start + size]
            stacked = np.stack([rows[at] for rows, at in zip(values, some, strict=True)], axis=1)
            if self._call.beside is not None:
                beside = self._call.beside[token].astype(np.float64)
                stacked = np.concatenate([stacked, np.broadcast_to(beside, (len(stacked), *beside.shape))], axis=1)
            fits, weighty = self._explained(np.full(len(stacked), token), stacked)
            fitting.extend(some[:, fits].T)
            known &= weighty[fits, : len(windows)].all(axis=0)
        if not fitting:
            self._wasted += ways.shape[1]
        for place, expert in enumerate(np.asarray(experts).tolist()):
            rows = sorted({int(windows[place][way[place]]) for way in fitting})
            if rows and not known[place]:
                only = len(rows) == 1 and len(windows[place]) == 1
                self._light[expert].setdefault(token, rows[0] if only else _NOWHERE)
            elif len(rows) == 1:
                self._accept_one(token, expert, rows[0])
                self._narrow(token, expert, rows[0])
            elif rows and self._alike(expert, rows):
                self._accept_one(token, expert, rows[0])
        return bool(fitting)

    def _alike(self, expert: int, rows: Sequence[int]) -> bool:
        values = self._call.rows[expert][list(rows)].astype(np.float64)
        apart = np.linalg.norm(values - values[0], axis=1).max()
        return bool(apart <= 4 * self._call.rounding * np.linalg.norm(values[0]))

    def _accept_one(self, token: int, expert: int, row: int) -> None:
        self.proven[expert][token] = row
        if token not in self.sent[expert]:
            self.sent[expert] |= {token}

    def _narrow(self, token: int, expert: int, row: int) -> None:
        """A proven row bounds those of the tokens listed before and behind it."""
        listed = self._lists[expert]
        found = np.flatnonzero(listed[:, 0] == token)
        if not len(found) or not self.low[token, listed[found[0], 1]] <= row <= self.high[token, listed[found[0], 1]]:
            return
        distance = np.arange(len(listed)) - found[0]
        tokens, choices = listed.T
        before, behind = distance <= 0, distance >= 0
        low, high = self.low[tokens, choices], self.high[tokens, choices]
        high = np.where(before, np.minimum(high, row + distance), high)
        low = np.where(behind, np.maximum(low, row + distance), low)
        self.low[tokens, choices], self.high[tokens, choices] = low, high
