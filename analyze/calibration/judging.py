"""Gathering the evidence of a comparison, site by site in dataflow order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...store.trace import Trace
from ..align import AlignedSite
from ..measure import Measurement, measure
from ..moments import NONFINITE
from ..pairs import Pair
from ..results import Judged, Outcomes
from ..verdict import FAIL, SHAPE_MISMATCH, UNDECIDED, Thresholds, settled_verdict
from .evidence import NOTHING, Tokens, evidence
from .kinds import kind_of
from .learned import Calibration
from .replicates import AtSite, Replicates
from .routing import BoolArray, Choices, Experts, Routed, RoutingLedger, flips_p_value
from .settling import Gathered, settle


class Judging:
    """Measures and judges the pairs of one comparison, in dataflow order."""

    def __init__(
        self,
        trace: Trace,
        runs: tuple[str, str | None, str],
        thresholds: Thresholds,
        replicates: Sequence[str] = (),
        calibration: Calibration | None = None,
        chunks: Sequence[Sequence[Pair]] = (),
    ) -> None:
        """Prepare for a comparison of reference, baseline and target, whose pairs come in `chunks`."""
        self._thresholds, self._calibration = thresholds, calibration
        self._baseline, self._target = runs[1:]
        config = trace.manifest(runs[0]).provenance.get("config")
        experts = Experts.of(config) if isinstance(config, dict) and runs[1] is not None else None
        self._routing = RoutingLedger(experts)
        self._replicates = Replicates(trace, runs[0], replicates, self._routing, chunks) if replicates else None
        self._gathered = Gathered(len(replicates))

    def measure(self, pair: Pair, exec_order: int, aligned: Mapping[str, Mapping[int, AlignedSite]]) -> list[Judged]:
        """Measure one pair in every phase: over all prompts first, then per prompt."""
        self._routing.advance(pair.reference.module)
        return [row for phase, sites in aligned.items() for row in self._phase(pair, exec_order, phase, sites)]

    def outcomes(self) -> Outcomes:
        """Judge what was measured, in the order in which it was."""
        return settle(self._gathered, self._thresholds, self._calibration)

    def _phase(self, pair: Pair, exec_order: int, phase: str, sites: Mapping[int, AlignedSite]) -> Iterator[Judged]:
        kind = kind_of(pair.reference)
        if any(site.clash() for site in sites.values()):
            self._gathered.add(None, phase, kind, FAIL)
            yield Judged(pair, exec_order, phase, None, None, SHAPE_MISMATCH)
            return
        found = measure({prompt: site.__iter__ for prompt, site in sites.items()})
        choices = self._routing.choices(pair.reference.module, sites)
        self._routing.note(pair.reference.module, choices, self._baseline, self._target)
        dtype = next(iter(sites.values())).target_dtype
        at = self._at_replicates(pair, dtype, choices)
        tokens = {prompt: self._tokens(pair, prompt, found[prompt], sites[prompt], choices) for prompt in sites}
        for prompt in (None, *sites):
            parts = list(tokens.values()) if prompt is None else [tokens[prompt]]
            self._gather(phase, kind, found[prompt], parts, choices, at, dtype)
            yield Judged(pair, exec_order, phase, prompt, found[prompt], found[prompt].state)

    def _at_replicates(self, pair: Pair, dtype: str, choices: Choices) -> AtSite | None:
        if self._replicates is None or (dtype.startswith(("int", "uint", "bool")) and not choices.by_prompt):
            return None
        return self._replicates.at(pair)

    def _tokens(self, pair: Pair, prompt: int, one: Measurement, site: AlignedSite, choices: Choices) -> Tokens:
        """The tokens of a prompt, and which of them each run sends elsewhere (or sees downstream of that)."""
        assert one.tokens is not None, "a record of one prompt holds its tokens"
        positions, module = one.tokens.positions, pair.reference.module
        runs = [self._baseline, self._target, *(self._replicates.runs if self._replicates else ())]
        touched: list[BoolArray] = [np.zeros(len(positions), bool) for _ in runs]
        if site.positioned:
            touched = [self._routing.touched(module, run, prompt, positions) for run in runs]
        upstream = touched[0] | touched[1]
        if choices.sparse and prompt in choices.by_prompt:
            choice = choices.by_prompt[prompt]
            for side, flips in enumerate((choice.baseline, choice.target)):
                touched[side] = touched[side] | np.isin(positions, choice.away(flips))
        return Tokens(prompt, one.tokens, touched[0], touched[1], upstream, tuple(touched[2:]))

    def _gather(
        self,
        phase: str,
        kind: str,
        one: Measurement,
        parts: Sequence[Tokens],
        choices: Choices,
        at: AtSite | None,
        dtype: str,
    ) -> None:
        """Keep what the verdict of one measurement needs."""
        nonfinite = one.state == NONFINITE and one.n_nonfinite_target > 0
        settled = settled_verdict(one.state, one.relative_l2, nonfinite, self._thresholds, dtype)
        flips = [_untouched(choices.by_prompt[part.prompt], part) for part in parts if part.prompt in choices.by_prompt]
        by_flips = bool(flips) and settled == UNDECIDED and one.state != NONFINITE
        self._gathered.add(
            one.prompt,
            phase,
            kind,
            settled,
            evidence(parts, self._thresholds.limit(kind), at) if settled is None else NOTHING,
            p_flips=flips_p_value(flips) if flips else float("nan"),
            by_flips=by_flips,
        )


def _untouched(choice: Routed, part: Tokens) -> Routed:
    """The tokens that no earlier router sent elsewhere: those that follow from it are not counted again."""
    away = part.errors.positions[part.upstream]
    return choice.at(~np.isin(choice.positions, away))
