"""Compare a target with a baseline against a reference: every number of a site, in bounded memory.

`measure` reads the tensors once for everything that sums can tell, and once more per level (prompt, all prompts)
for exact quantiles when the errors are too many to be sorted. Besides the results it holds, per thread and side,
64 Ki errors and 2^15 counts, and at most 3 Mi collected errors per side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import TypeAlias

import numpy as np

from . import rows
from .intervals import interval_over_prompts, interval_over_tokens
from .moments import NONFINITE, Moments, moments_of
from .quantiles import PROBABILITIES, QQ, qq_numbers, quantiles_of_sorted
from .scan import Scanner, Sums
from .selection import Binning, Selection, Tally
from .triples import FloatArray, Groups, IntArray, Triple, reopen

__all__ = ["PROBABILITIES", "ErrorQuantiles", "Measurement", "TokenErrors", "Triple", "measure"]

Sides: TypeAlias = tuple[Tally, Tally]


@dataclass(frozen=True, slots=True)
class ErrorQuantiles:
    """Quantiles of b - r and t - r on `PROBABILITIES`, float64, exact (numpy's 'linear'); NaN when undefined."""

    baseline: FloatArray
    target: FloatArray


@dataclass(frozen=True, slots=True)
class TokenErrors:
    """Sums of squares per position: float64 arrays as long as `positions`; NaN where a value is not finite."""

    positions: IntArray
    reference_sq: FloatArray
    baseline_sq: FloatArray
    target_sq: FloatArray

    def sums(self) -> FloatArray:
        """`float64[tokens, 3]`: reference, baseline, target, as the intervals take them."""
        return np.stack([self.reference_sq, self.baseline_sq, self.target_sq], axis=1)


@dataclass(frozen=True, slots=True)
class Measurement(Moments):
    """All numbers of one site and prompt (or of all prompts: `prompt` None); see `Moments` for the sums.

    r_low, r_high: 95 % interval of R by cluster bootstrap (`intervals`); NaN for fewer than two tokens or when R
        is not a finite number.
    qq_slope, qq_intercept, qq_w1, ks: see `quantiles.qq_numbers`; NaN when quantiles were not asked for.
    quantiles: None when not asked for.
    tokens: None in the record of all prompts.
    """

    prompt: int | None
    r_low: float
    r_high: float
    qq_slope: float
    qq_intercept: float
    qq_w1: float
    ks: float
    quantiles: ErrorQuantiles | None
    tokens: TokenErrors | None


def measure(groups: Groups, *, quantiles: bool = True, threads: int | None = None) -> dict[int | None, Measurement]:
    """Measure one site.

    Args:
        groups: per prompt id, its triples: a sequence, or a callable that opens them anew. They are read several
            times when `quantiles` is set, one at a time.
        quantiles: also compute error quantiles and the numbers that follow from them.
        threads: for triples of half a million elements and more; default: all processors. Smaller ones are read in
            the calling thread.

    Returns:
        One record per prompt, then the record over all prompts under None.

    Raises:
        ValueError: no prompt at all, only some triples with a baseline, or an iterator in place of a sequence.
        TypeError: a dtype that cannot be compared.
        selection.InputChangedError: tensors changed while they were read.
    """
    if not groups:
        raise ValueError("nothing to measure: no prompt was given")
    binning = Binning()
    whole: Sides = (Tally(binning), Tally(binning))
    records: dict[int | None, Measurement] = {}
    parts: list[Sums] = []
    with Scanner(threads or os.cpu_count() or 1) as scanner:
        for prompt, triples in groups.items():
            sums, sides = _first_pass(scanner, reopen(triples), binning if quantiles else None)
            found = _quantiles(scanner, sums, sides, partial(reopen, triples)) if quantiles else None
            interval = interval_over_tokens(_token_errors(sums).sums())
            records[prompt] = _record(prompt, sums, interval, found)
            parts.append(sums)
            if len(groups) > 1:
                for everything, side in zip(whole, sides, strict=True):
                    everything.absorb(side)
        if len(parts) == 1:
            records[None] = replace(next(iter(records.values())), prompt=None, tokens=None)
            return records
        total = _pooled(parts)
        found = _quantiles(scanner, total, whole, partial(_every_triple, groups)) if quantiles else None
    interval = interval_over_prompts([_token_errors(sums).sums() for sums in parts])
    records[None] = _record(None, total, interval, found)
    return records


def _pooled(parts: list[Sums]) -> Sums:
    """Sums over all prompts, without the tokens."""
    kinds = {sums.has_baseline for sums in parts if len(sums.positions)}
    if len(kinds) > 1:
        raise ValueError("some prompts have a baseline and others have none: compare them separately")
    return Sums(
        rows.fold(np.stack([sums.total for sums in parts])),
        np.zeros((0, rows.TOKEN_COLUMNS)),
        np.zeros(0, np.int64),
        kinds != {False},
    )


def _every_triple(groups: Groups) -> Iterator[Triple]:
    return chain.from_iterable(reopen(triples) for triples in groups.values())


def _first_pass(scanner: Scanner, triples: Iterable[Triple], binning: Binning | None) -> tuple[Sums, Sides]:
    """Sums and, with a binning, the tallies of both errors."""
    if binning is None:
        nothing = Binning()
        return scanner.sums(triples, scanner.buffers([None] * scanner.threads)), (Tally(nothing), Tally(nothing))
    whole: Sides = (Tally(binning), Tally(binning))
    parts = [(Tally(binning), Tally(binning)) for _ in range(scanner.threads)]
    buffers = scanner.buffers([_counter(*part) for part in parts])
    sums = scanner.sums(triples, buffers)
    for buffer, part in zip(buffers, parts, strict=True):
        for side in (0, 1):
            part[side].hold(buffer.errors[side, : buffer.filled])
            whole[side].absorb(part[side])
    return sums, whole


def _counter(baseline: Tally, target: Tally) -> Callable[[FloatArray, FloatArray], None]:
    def take(baseline_errors: FloatArray, target_errors: FloatArray) -> None:
        baseline.count(baseline_errors)
        target.count(target_errors)

    return take


def _quantiles(scanner: Scanner, sums: Sums, sides: Sides, triples: Callable[[], Iterable[Triple]]) -> ErrorQuantiles:
    """Exact quantiles from tallies, reading the triples again as often as the tallies demand."""
    found = [np.full(len(PROBABILITIES), np.nan) for _ in sides]
    selections: dict[int, Selection] = {}
    if moments_of(sums.total, sums.has_baseline).state != NONFINITE:
        for side in (0, 1) if sums.has_baseline else (1,):
            values = sides[side].settle()
            if values is None:
                selections[side] = Selection(sides[side])
            else:
                found[side] = quantiles_of_sorted(values)
    while pending := {side: selection for side, selection in selections.items() if selection.pending}:

        def take(*errors: FloatArray, pending: dict[int, Selection] = pending) -> None:
            for side, selection in pending.items():
                selection.take(errors[side])

        scanner.errors(triples(), take)
        for selection in pending.values():
            selection.end_pass()
    for side, selection in selections.items():
        found[side] = selection.quantiles()
    return ErrorQuantiles(found[0], found[1])


def _token_errors(sums: Sums) -> TokenErrors:
    tokens = sums.tokens.copy()
    tokens[tokens[:, rows.BAD] > 0] = np.nan
    if not sums.has_baseline:
        tokens[:, rows.BASELINE_SQ] = np.nan
    return TokenErrors(
        sums.positions, *(tokens[:, column] for column in (rows.REFERENCE_SQ, rows.BASELINE_SQ, rows.TARGET_SQ))
    )


def _record(
    prompt: int | None, sums: Sums, interval: tuple[float, float], quantiles: ErrorQuantiles | None
) -> Measurement:
    moments = moments_of(sums.total, sums.has_baseline)
    if not np.isfinite(moments.r_ratio):
        interval = (float("nan"), float("nan"))
    qq = QQ(np.nan, np.nan, np.nan, np.nan)
    if quantiles is not None:
        qq = qq_numbers(quantiles.baseline, quantiles.target, moments.baseline_std)
    return Measurement(
        **{field.name: getattr(moments, field.name) for field in fields(Moments)},
        prompt=prompt,
        r_low=interval[0],
        r_high=interval[1],
        qq_slope=qq.slope,
        qq_intercept=qq.intercept,
        qq_w1=qq.w1,
        ks=qq.ks,
        quantiles=quantiles,
        tokens=None if prompt is None else _token_errors(sums),
    )
