"""Which tokens a mixture of experts sends elsewhere than the reference does, and whether chance explains it.

Where two experts score almost alike, rounding decides. A token that is sent to another expert is wrong as a whole,
in a faithful port as in the baseline, and a handful of such tokens outweighs the rounding of all others. They are
therefore counted, and everything downstream of them is left out of R: within the layer the token itself, in later
layers also the tokens after it, which attend to it.

A port whose routing is broken cannot hide behind that: where the tokens agree on their experts, wrong weights or a
wrong number of experts show in R of the experts' output; where they do not, there are too many flips. These are held
against the baseline's (exact McNemar test on tokens that only one of the two sends elsewhere) and against the number
that the reference's margins explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import binom, poisson

from ..align import AlignedSite
from ..triples import FloatArray, IntArray, Triple
from .kinds import layer_of

BoolArray = npt.NDArray[np.bool_]

_ROUTER_NAMES = ("gate", "router")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")


def is_router(module: str) -> bool:
    """Whether a module is a router by its name, or the projection within one."""
    return any(part in _ROUTER_NAMES for part in module.rsplit(".", 2)[-2:])


@dataclass(frozen=True)
class Experts:
    """Number of experts of a model, and how many of them a token is sent to."""

    count: int
    chosen: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experts | None:
        """Read a transformers configuration; None for a dense model."""
        for part in (config, config.get("text_config") or {}):
            count = next((part[name] for name in _EXPERTS if part.get(name)), None)
            chosen = next((part[name] for name in _CHOSEN if part.get(name)), None)
            if count and chosen and chosen < count:
                return cls(int(count), int(chosen))
        return None

    def routed_by(self, module: str, features: int, dtype: str) -> bool:
        """Whether a site holds scores of all experts, or indices of the chosen ones."""
        if not is_router(module):
            return False
        return features == (self.chosen if _is_integer(dtype) else self.count)


@dataclass(frozen=True)
class Routed:
    """The choice of experts at the tokens of one prompt, held against the reference's; arrays as long as `positions`.

    Attributes:
        positions: of the tokens.
        baseline: the baseline chose another set.
        target: the target chose another set.
        tied: the last chosen and the first left out score alike in one of the runs, so that the set is not known.
        expected: chance of a flip, from the reference's margin and the baseline's rounding; NaN where only indices
            were recorded.
    """

    positions: IntArray
    baseline: BoolArray
    target: BoolArray
    tied: BoolArray
    expected: FloatArray

    def columns(self) -> tuple[IntArray, BoolArray, BoolArray, BoolArray, FloatArray]:
        """The arrays, in the order of the fields."""
        return self.positions, self.baseline, self.target, self.tied, self.expected

    def at(self, which: BoolArray) -> Routed:
        """Some of the tokens."""
        positions, baseline, target, tied, expected = self.columns()
        return Routed(positions[which], baseline[which], target[which], tied[which], expected[which])

    @classmethod
    def joined(cls, parts: Sequence[Routed]) -> Routed:
        """The tokens of all parts."""
        positions, baseline, target, tied, expected = zip(*(part.columns() for part in parts), strict=True)
        return cls(*map(np.concatenate, (positions, baseline, target, tied, expected)))

    def away(self, run: BoolArray) -> IntArray:
        """Positions whose experts are not surely the reference's in one of the runs."""
        return self.positions[run | self.tied]


def routed(triples: Iterable[Triple], experts: Experts) -> Routed:
    """Compare the choice of experts token by token; the triples hold scores or indices."""
    return Routed.joined([_routed(triple, experts.chosen) for triple in triples])


def _routed(triple: Triple, chosen: int) -> Routed:
    runs = [triple.reference, triple.target if triple.baseline is None else triple.baseline, triple.target]
    nothing = np.zeros(len(triple.positions), bool)
    if _is_integer(triple.target.dtype.name):
        sets = [np.sort(run.astype(np.int64), axis=1) for run in runs]
        away = [(run != sets[0]).any(axis=1) for run in sets[1:]]
        return Routed(triple.positions, away[0], away[1], nothing, np.full(len(nothing), np.nan))
    scores = [run.astype(np.float64) for run in runs]
    masks, margins = zip(*(_top(run, chosen) for run in scores), strict=True)
    away = [(mask != masks[0]).any(axis=1) for mask in masks[1:]]
    tied = np.any([margin == 0.0 for margin in margins], axis=0)
    return Routed(triple.positions, away[0], away[1], tied, _expected(scores[0], scores[1], margins[0], away[0]))


def _top(scores: FloatArray, chosen: int) -> tuple[BoolArray, FloatArray]:
    """The experts with the largest scores as a mask, and the margin to the next one."""
    order = np.argsort(-scores, axis=1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[:, :chosen], True, axis=1)
    ranked = np.take_along_axis(scores, order[:, chosen - 1 : chosen + 1], axis=1)
    return mask, ranked[:, 0] - ranked[:, 1]


def _expected(reference: FloatArray, baseline: FloatArray, margin: FloatArray, away: BoolArray) -> FloatArray:
    """Chance that rounding as large as the baseline's closes the margin, per token.

    Two experts swap when the difference of their errors exceeds the margin; its standard deviation is sqrt(2) times
    that of one error.
    """
    calm = (baseline - reference)[~away]
    noise = float(np.sqrt(np.mean(calm * calm))) if calm.size else float("nan")
    if not noise > 0:
        return np.where(margin > 0, 0.0, 0.5)
    return np.asarray(ndtr(-margin / (np.sqrt(2.0) * noise)))


def flips_p_value(parts: Sequence[Routed]) -> float:
    """Chance that a clean target sends this many tokens elsewhere; tokens downstream of earlier flips do not count.

    The larger of two p-values: against the baseline (McNemar, exact), and against the number that the margins explain
    (Poisson); the latter only where scores were recorded.
    """
    only_target = sum(int((part.target & ~part.baseline & ~part.tied).sum()) for part in parts)
    only_baseline = sum(int((part.baseline & ~part.target & ~part.tied).sum()) for part in parts)
    value = float(binom.sf(only_target - 1, only_target + only_baseline, 0.5)) if only_target else 1.0
    expected = sum(float(part.expected.sum()) for part in parts)
    if np.isnan(expected):
        return value
    flips = sum(int((part.target & ~part.tied).sum()) for part in parts)
    return max(value, float(poisson.sf(flips - 1, max(expected, 1e-300)))) if flips else 1.0


@dataclass(frozen=True)
class Choices:
    """What a router site tells.

    Attributes:
        by_prompt: the choice of experts per prompt; empty for a site that is no router.
        sparse: scores of experts that were not chosen are zero, so that a flip changes the scores themselves.
    """

    by_prompt: Mapping[int, Routed]
    sparse: bool = False


class Rerouted:
    """Tokens of one run that are downstream of a flip. Routers are added in dataflow order."""

    def __init__(self) -> None:
        """Nothing is rerouted yet."""
        self._flips: dict[str, dict[int, IntArray]] = {}

    def add(self, module: str, prompt: int, positions: IntArray) -> None:
        """A router in `module` sends the tokens at these positions elsewhere."""
        if len(positions):
            of_layer = self._flips.setdefault(layer_of(module), {})
            of_layer[prompt] = np.union1d(of_layer.get(prompt, positions), positions)

    def touched(self, module: str, prompt: int, positions: IntArray) -> BoolArray:
        """Which positions at a site in `module` are downstream of a flip."""
        layer = layer_of(module)
        result = np.zeros(len(positions), bool)
        for other, by_prompt in self._flips.items():
            flips = by_prompt.get(prompt)
            if flips is not None:
                result |= np.isin(positions, flips) if other == layer else positions >= flips[0]
        return result


class RoutingLedger:
    """Flips of every run of a comparison against its reference, gathered while its sites pass in dataflow order."""

    def __init__(self, experts: Experts | None) -> None:
        """`experts` is None for a dense model: then nothing is ever rerouted."""
        self._experts = experts
        self._runs: dict[str, Rerouted] = {}
        self._waiting: list[tuple[str, str, int, IntArray]] = []

    def advance(self, module: str) -> None:
        """The next site belongs to `module`: flips of routers passed by now take effect downstream."""
        if self._waiting and self._waiting[0][0] != module:
            for router, run, prompt, positions in self._waiting:
                self._runs.setdefault(run, Rerouted()).add(router, prompt, positions)
            self._waiting.clear()

    def choices(self, module: str, sites: Mapping[int, AlignedSite]) -> Choices:
        """The choice of experts at a site, per prompt."""
        first = next(iter(sites.values()))
        if self._experts is None or not first.positioned or not is_router(module):
            return Choices({})
        piece = next(iter(first))
        if not self._experts.routed_by(module, piece.reference.shape[1], first.target_dtype):
            return Choices({})
        sparse = not _is_integer(first.target_dtype) and bool((piece.reference == 0).any())
        by_prompt = {prompt: routed(site, self._experts) for prompt, site in sites.items()}
        if sparse:  # what is left of the scores of experts that were not chosen tells no margin
            by_prompt = {p: replace(c, expected=np.full(len(c.positions), np.nan)) for p, c in by_prompt.items()}
        return Choices(by_prompt, sparse)

    def note(self, module: str, choices: Choices, baseline: str | None, target: str) -> None:
        """Remember the flips at a router of the runs that were measured as baseline and as target."""
        for prompt, choice in choices.by_prompt.items():
            self._waiting.append((module, target, prompt, choice.away(choice.target)))
            if baseline is not None:
                self._waiting.append((module, baseline, prompt, choice.away(choice.baseline)))

    def touched(self, module: str, run: str | None, prompt: int, positions: IntArray) -> BoolArray:
        """Which tokens at a site are downstream of a flip of a run."""
        found = None if run is None else self._runs.get(run)
        return np.zeros(len(positions), bool) if found is None else found.touched(module, prompt, positions)


def _is_integer(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))
