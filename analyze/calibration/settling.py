"""From evidence to verdicts: null distributions, q-values over all sites, and limits of R.

A q-value needs the p-values of all sites, so verdicts wait for the last site; what is kept of a measurement until
then is one row of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..results import Outcomes
from ..triples import FloatArray
from ..verdict import ALPHA, CEILING, FAIL, PASS, UNDECIDED, Thresholds, flips_verdict, r_verdict
from .discovery import q_values
from .evidence import NOTHING, Evidence
from .kinds import kind_in_phase
from .learned import Calibration
from .null import Null, null_of_replicates

_BY_R, _BY_FLIPS = "r", "flips"
_STATES = (PASS, FAIL, UNDECIDED, _BY_R, _BY_FLIPS)


class Gathered:
    """One row per measurement, compact until all are there."""

    def __init__(self, n_replicates: int) -> None:
        """Room for the log R of so many replicates per row."""
        names = ("r", "r_low", "p", "spread", "p_flips")
        numbers = [(name, np.float64) for name in names]
        whole = [(name, np.int32) for name in ("prompt", "kind", "state", "n_rerouted")]
        self._dtype = np.dtype([*whole, *numbers, ("replicates", np.float64, (n_replicates,))])
        self._n_replicates = n_replicates
        self._chunks: list[npt.NDArray[Any]] = []
        self._pending: list[tuple[Any, ...]] = []
        self._kinds: dict[tuple[str, str], int] = {}

    def add(
        self,
        prompt: int | None,
        phase: str,
        kind: str,
        settled: str | None,
        found: Evidence = NOTHING,
        *,
        p_flips: float = float("nan"),
        by_flips: bool = False,
    ) -> None:
        """Append a measurement; `settled` is its verdict, or None where R decides (flips, with `by_flips`)."""
        state = _STATES.index(_BY_FLIPS if by_flips else settled or _BY_R)
        place = self._kinds.setdefault((phase, kind), len(self._kinds))
        replicates = found.replicates or (np.nan,) * self._n_replicates
        numbers = (found.r, found.r_low, found.p_value, found.spread, p_flips)
        self._pending.append((-1 if prompt is None else prompt, place, state, found.n_rerouted, *numbers, replicates))
        if len(self._pending) >= 1024:
            self._flush()

    def table(self) -> npt.NDArray[Any]:
        """All rows."""
        self._flush()
        return np.concatenate([np.zeros(0, self._dtype), *self._chunks])

    def kinds(self) -> Sequence[tuple[str, str]]:
        """Phase and kind of site by number."""
        return list(self._kinds)

    def _flush(self) -> None:
        self._chunks.append(np.array(self._pending, self._dtype))
        self._pending.clear()


def settle(gathered: Gathered, thresholds: Thresholds, calibration: Calibration | None) -> Outcomes:
    """Judge every measurement.

    Measurements over all prompts are one family of tests, those of single prompts another.
    """
    rows = gathered.table()
    kinds = gathered.kinds()
    p, q = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    q_flips = q.copy()
    tolerated = np.array([thresholds.limit(kind) for _, kind in kinds] or [np.nan])[rows["kind"]]
    limit = tolerated.copy()
    by_r = rows["state"] == _STATES.index(_BY_R)
    for family in (rows["prompt"] < 0, rows["prompt"] >= 0):
        where = np.flatnonzero(family & by_r)
        if len(where):
            p[where], limit[where] = _p_values(rows[where], kinds, limit[where], calibration)
            q[where] = q_values(p[where])
        q_flips[family] = q_values(rows["p_flips"][family])
    by_flips = rows["state"] == _STATES.index(_BY_FLIPS)
    p[by_flips], q[by_flips] = rows["p_flips"][by_flips], q_flips[by_flips]
    limit[~by_r] = np.nan
    verdicts = [
        _verdict(_STATES[row["state"]], row, (float(tolerated[n]), float(limit[n])), float(q[n]), q_flips[n])
        for n, row in enumerate(rows)
    ]
    overall = [verdict for verdict, prompt in zip(verdicts, rows["prompt"], strict=True) if prompt < 0]
    columns = {"p_value": p, "q_value": q, "r_judged": rows["r"], "r_limit": limit}
    return Outcomes(tuple(verdicts), tuple(overall), rows["n_rerouted"], columns, tuple(_notes(rows)))


def _notes(rows: npt.NDArray[Any]) -> list[str]:
    overall = rows[rows["prompt"] < 0]
    sites, most = int((overall["n_rerouted"] > 0).sum()), int(overall["n_rerouted"].max(initial=0))
    if not sites:
        return []
    return [f"experts differ at some tokens: up to {most} of them are left out of the verdicts of {sites} measurements"]


def _verdict(state: str, row: npt.NDArray[Any], limits: tuple[float, float], q: float, q_flips: float) -> str:
    p_flips = float(row["p_flips"])
    if state == _BY_FLIPS:
        return flips_verdict(p_flips, q_flips)
    if state != _BY_R:
        return state
    if flips_verdict(p_flips, q_flips) == FAIL:
        return FAIL
    tolerated, limit = limits
    return r_verdict(float(row["r"]), limit, q, float(row["r_low"]), tolerated=tolerated)


def _p_values(
    rows: npt.NDArray[Any], kinds: Sequence[tuple[str, str]], limit: FloatArray, calibration: Calibration | None
) -> tuple[FloatArray, FloatArray]:
    """p-values of R, and its limits: from the replicates, else the calibration, else the tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_r = np.log(rows["r"])
    names = [kind_in_phase(kind, phase) for phase, kind in kinds]
    of_rows = [names[kind] for kind in rows["kind"]]
    null: Null | None = None
    if rows["replicates"].shape[1]:
        null = null_of_replicates(rows["replicates"], of_rows).widened(rows["spread"])
        # All sites of a clean port stay below this together, with probability 1 - ALPHA (Bonferroni).
        limit = np.fmax(limit, np.fmin(null.quantile(1.0 - ALPHA / len(rows)), CEILING))
    elif calibration is not None:
        null = calibration.null_of(of_rows).widened(rows["spread"])
    if null is None:
        return rows["p"], limit
    p = null.p_values(log_r)
    return np.where(np.isnan(p), rows["p"], p), limit
