"""The rows of experts that are modules of their own, by token: recovered from one run's trace.

Blocks are known by their structure: `<block>.experts.<number>` beside a router `<block>.gate` or `<block>.router`
that scores as many experts as the model's configuration says. Each call of a block is searched by itself
(`expert_rows`): a token's row in an expert is taken only if the block's output proves it.

The modules within an expert are handed its rows as one matrix. That they keep their order is checked wherever values
can tell: what the last of them returns is what the expert returns, bit for bit; inputs are rows of the block's input,
bit for bit; SiLU is SiLU of what came before it. One contradiction, and all modules within that expert are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import ml_dtypes
import numpy as np

from ..store.dims import by_position
from ..store.manifest import RunManifest
from ..store.trace import Trace
from .calibration.routing import Experts
from .expert_rows import Array, BlockCall, TokenRows, find_rows
from .naming import MAIN_SLOTS
from .ranks import Stored
from .sites import Site

#: A token: the run's prompt and the position.
Token = tuple[int, int]

_EXPERT = re.compile(r"^(?P<block>.*)\.experts\.(?P<number>\d+)(?:\.(?P<part>.+))?$")
_ROUTERS, _SHARED = ("gate", "router"), ("shared_expert", "shared_experts")

_TENSORS = """
SELECT run, rank, seq, prompt, phase, step, call, module, port, slot, dims, position_start, position_count, dtype,
       shape, nbytes, file_offset, s.path
FROM tensors t JOIN shards s USING (run, rank, shard)
WHERE run = ? AND phase <> 'static' AND (module = ? OR starts_with(module, ? || '.')) AND dataset <> ''
ORDER BY rank, seq
"""


@dataclass(frozen=True)
class Expert:
    """Where a module stands among experts: the block, the expert's number, and the path within the expert."""

    block: str
    number: int
    part: str

    @classmethod
    def of(cls, module: str) -> Expert | None:
        """Read a module path; None for a module that is no expert and not within one."""
        found = _EXPERT.match(module)
        return None if found is None else cls(found["block"], int(found["number"]), found["part"] or "")


@dataclass(frozen=True)
class _Call:
    """What was found of one call of a block.

    Attributes:
        first: number of its first tensor in the order of recording.
        last: number of its last tensor.
        tokens: of the call, in the order of the batch; `found` counts them.
        found: rows by expert and token.
        n_rows: rows that each expert was given.
        contradicted: experts whose modules do not keep the order of rows.
    """

    first: int
    last: int
    tokens: Sequence[Token]
    found: TokenRows
    n_rows: Mapping[int, int]
    contradicted: frozenset[int]


class RoutedBlock:
    """A mixture of experts of one run, whose experts are modules of their own."""

    def __init__(self, trace: Trace, manifest: RunManifest, block: str, experts: Experts) -> None:
        """Read what the block and everything in it recorded, and prove which rows are which tokens'."""
        silu = frozenset(module.path for module in manifest.modules if module.cls in ("SiLU", "SiLUActivation"))
        rows = trace.query(_TENSORS, [manifest.run, block, block]).to_pylist()
        calls = (_Recorded(trace, block, experts, silu, tensors).proven() for tensors in _by_call(rows, block))
        found = list(calls)
        self._calls = [call for call in found if call is not None]
        self._n_unknown = len(found) - len(self._calls)
        self._contradicted = frozenset[int]().union(*(call.contradicted for call in self._calls))

    @property
    def complete(self) -> bool:
        """Whether the choices of the router are known in every call."""
        return self._n_unknown == 0 and bool(self._calls)

    def sent(self, number: int) -> frozenset[Token]:
        """The tokens that the router sent to an expert, as far as its scores tell."""
        return frozenset(call.tokens[token] for call in self._calls for token in call.found.sent.get(number, ()))

    def placed(self, site: Site, tensors: Sequence[tuple[int, Stored]]) -> list[Stored]:
        """The tensors of a site with the proven row of every token, without those that have none.

        Args:
            site: of an expert, or of a module within one.
            tensors: all of the site, each with its number in the order of recording.
        """
        expert = Expert.of(site.module)
        found: list[Stored] = []
        if expert is None or ((expert.part or site.port == "input") and expert.number in self._contradicted):
            return found
        for call in self._calls:
            here = [stored for seq, stored in tensors if call.first <= seq <= call.last]
            if sum(map(_n_rows, here)) == call.n_rows.get(expert.number, -1):
                row_of = call.found.row.get(expert.number, {})
                found += _placed(here, {row: call.tokens[token] for token, row in row_of.items()})
        return found


class _Recorded:
    """The tensors of one call of a block, in the order in which they were recorded."""

    def __init__(
        self,
        trace: Trace,
        block: str,
        experts: Experts,
        silu: frozenset[str],
        tensors: Sequence[tuple[int, Site, Stored]],
    ) -> None:
        self._trace, self._block, self._experts, self._silu = trace, block, experts, silu
        self._span = tensors[0][0], tensors[-1][0]
        self._tensors: dict[Site, list[Stored]] = {}
        for _, site, stored in tensors:
            self._tensors.setdefault(site, []).append(stored)

    def proven(self) -> _Call | None:
        """Search the rows; None where the router's scores or the block's output were not recorded."""
        scores, output = self._scores(), self._whole(self._block, MAIN_SLOTS)
        if scores is None or output is None or scores[0] != output[0]:
            return None
        rows = {
            number: self._joined(self._tensors[site])
            for number in range(self._experts.count)
            if (site := Site(f"{self._block}.experts.{number}")) in self._tensors
        }
        if not rows or any(values.shape[1] != output[1].shape[1] for values in rows.values()):
            return None
        tokens = scores[0]
        shared = [self._whole(f"{self._block}.{name}", MAIN_SLOTS) for name in _SHARED]
        beside = [found[1] for found in shared if found is not None and found[0] == tokens]
        found = find_rows(
            BlockCall(
                scores[1].astype(np.float64),
                output[1],
                rows,
                self._experts.chosen,
                rounding_of(output[1].dtype),
                np.stack(beside, axis=1) if beside else None,
            )
        )
        given = self._whole(self._block, MAIN_SLOTS, "input")
        given = given if given is not None and given[0] == tokens else None
        wrong = frozenset(
            number
            for number, values in rows.items()
            if not self._keeps_order(number, values, found.row.get(number, {}), None if given is None else given[1])
        )
        return _Call(*self._span, tokens, found, {number: len(values) for number, values in rows.items()}, wrong)

    def _scores(self) -> tuple[list[Token], Array] | None:
        """Scores of the router, with the tokens in the order of the batch."""
        for name in _ROUTERS:
            for slot in (*MAIN_SLOTS, "1"):
                found = self._whole(f"{self._block}.{name}", (slot,))
                if found is not None and found[1].shape[1] == self._experts.count and found[1].dtype.kind not in "iub":
                    return found
        return None

    def _joined(self, tensors: Sequence[Stored]) -> Array:
        """Rows of tensors as they were stored, one below the other."""
        arrays = [stored.parts[0].values(self._trace).reshape(_n_rows(stored), -1) for stored in tensors]
        return np.concatenate(arrays)

    def _whole(self, module: str, slots: Iterable[str], port: str = "output") -> tuple[list[Token], Array] | None:
        """`[tokens, features]` of the first of some sites that has positions, with its tokens."""
        for slot in slots:
            chosen = self._tensors.get(Site(module, port, slot), [])
            if chosen and all(stored.position_start is not None for stored in chosen):
                arrays = [by_position(stored.parts[0].values(self._trace), stored.dims) for stored in chosen]
                if len({array.shape[1] for array in arrays}) == 1:
                    tokens = [(stored.prompt, position) for stored in chosen for position in stored.positions]
                    return tokens, np.concatenate(arrays)
        return None

    def _keeps_order(self, number: int, output: Array, row_of: Mapping[int, int], given: Array | None) -> bool:
        """Whether nothing that was recorded within an expert contradicts that its modules keep the order of rows.

        Args:
            number: of the expert.
            output: what it returned, `[rows, H]`.
            row_of: the proven row by token.
            given: input of the block, `[tokens, H]`, if recorded.
        """
        expert = f"{self._block}.experts.{number}"
        inside = {
            site: self._joined(tensors)
            for site, tensors in self._tensors.items()
            if f"{site.module}.".startswith(f"{expert}.") and site.call == 0
        }
        results = [(site, values) for site, values in inside.items() if site.port == "output" and site.module != expert]
        if results and not _same_bits(results[-1][1], output):
            return False
        for (_, before), (site, after) in pairwise(results):
            if site.module in self._silu and before.shape == after.shape and not _is_silu(before, after):
                return False
        tokens, rows = list(row_of), list(row_of.values())
        return given is None or all(
            len(values) == len(output) and _same_bits(values[rows], given[tokens])
            for site, values in inside.items()
            if site.port == "input" and site.slot in ("", "0") and _takes_tokens(site)
        )


def _takes_tokens(site: Site) -> bool:
    """Whether a module within an expert is given the expert's own rows: the first projections, by their names."""
    expert = Expert.of(site.module)
    return expert is not None and expert.part in ("", "w1", "w3", "gate_proj", "up_proj", "gate_up_proj")


def _by_call(rows: Iterable[Mapping[str, Any]], block: str) -> list[list[tuple[int, Site, Stored]]]:
    """Tensors of a block, split where it was called anew: whatever follows its output belongs to the next call."""
    calls: list[list[tuple[int, Site, Stored]]] = []
    ended = True
    for row in rows:
        is_end = row["module"] == block and row["port"] == "output"
        if (ended and not is_end) or not calls:
            calls.append([])
        ended = is_end
        calls[-1].append((row["seq"], Site(row["module"], row["port"], row["slot"], row["call"]), Stored.of(row)))
    return calls


def _n_rows(stored: Stored) -> int:
    return stored.shape[0] if stored.shape else 0


def _placed(tensors: Sequence[Stored], token_of: Mapping[int, Token]) -> list[Stored]:
    """Tensors with the row of every token, one per prompt that they hold."""
    placed: list[Stored] = []
    first = 0
    for stored in tensors:
        by_prompt: dict[int, dict[int, int]] = {}
        for row in range(_n_rows(stored)):
            prompt, position = token_of.get(first + row, (None, 0))
            if prompt is not None:
                by_prompt.setdefault(prompt, {})[position] = row
        first += _n_rows(stored)
        placed += [
            replace(stored, prompt=prompt, dims="", position_start=min(held), position_count=len(held), held=held)
            for prompt, held in by_prompt.items()
        ]
    return placed


def rounding_of(dtype: np.dtype[Any]) -> float:
    """Unit roundoff of a dtype: half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def _same_bits(one: Array, other: Array) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _is_silu(before: Array, after: Array) -> bool:
    x = before.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = x / (1 + np.exp(-x))
    return bool(np.allclose(after.astype(np.float64), expected, rtol=4 * rounding_of(after.dtype), atol=1e-6))


_KNOWN: WeakKeyDictionary[Trace, dict[tuple[str, str, str], RoutedBlock]] = WeakKeyDictionary()


def routed_block(trace: Trace, manifest: RunManifest, module: str) -> RoutedBlock | None:
    """The mixture of experts that a module of a run is an expert of, or within one; None if it is neither.

    A block is searched once as long as the trace is open.
    """
    expert = Expert.of(module)
    config = manifest.provenance.get("config")
    experts = Experts.of(config) if isinstance(config, dict) else None
    if expert is None or experts is None or manifest.tp != 1:
        return None
    known = _KNOWN.setdefault(trace, {})
    key = (manifest.run, manifest.created_at, expert.block)
    if key not in known:
        known[key] = RoutedBlock(trace, manifest, expert.block, experts)
        trace.release_pages()
    return known[key]
