"""Learning limits from known-good comparisons.

The published rules are the floor: tau_R = max(1.2, q99 of the known-good R), and by kind of site max(1.2, 1.1 q99).
On top of that, limits are tolerance limits (see `limits`), which allow for how few observations there are.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...store.calibrations import read_calibration, write_calibration
from ...store.errors import InputError
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..sites import Site
from ..triples import FloatArray
from ..verdict import Thresholds
from .kinds import kind_in_phase, kind_of
from .learned import Calibration
from .limits import limits_by_kind, nulls_by_kind, tolerance_limit

_PUBLISHED = Thresholds()
_SPARE = 1.1
#: A limit from one or two comparisons is at most this many times the worst that was seen.
_MOST = 2.0
_LARGEST_DELTA = 1.0

_MEASURED = """
SELECT DISTINCT comparison, module, port, slot, call, phase, coalesce(r_judged, r_ratio) AS r, relative_l2
FROM measurements
WHERE comparison IN (SELECT unnest(?)) AND prompt IS NULL AND state = 'measured' AND isfinite(relative_l2)
"""
_BAD = """
SELECT comparison, site, state FROM measurements
WHERE comparison IN (SELECT unnest(?)) AND state IN ('nonfinite', 'shape_mismatch') ORDER BY comparison, measurement
"""
_LOGITS = """
SELECT comparison, quantile_cont(cosine, 0.05) AS cosine, quantile_cont(kl, 0.95) AS kl,
       avg(top1::INTEGER) AS top1, count(*) AS n
FROM logits WHERE comparison IN (SELECT unnest(?)) AND isfinite(cosine) AND isfinite(kl) GROUP BY ALL
"""


@dataclass(frozen=True)
class Observations:
    """What known-good comparisons measured.

    Attributes:
        r_by_kind: R by kind of site.
        r_by_phase: R by kind of site and phase, as `kinds.kind_in_phase` writes them.
        relative_l2: relative L2 of all sites.
        logits: per comparison: 5 % quantile of the cosine, 95 % quantile of KL, top-1 agreement, positions.
    """

    r_by_kind: Mapping[str, FloatArray]
    r_by_phase: Mapping[str, FloatArray]
    relative_l2: FloatArray
    logits: Sequence[Mapping[str, Any]]


def calibrate(trace: Trace, comparisons: Sequence[str], name: str, *, progress: Progress = no_progress) -> Calibration:
    """Learn limits from known-good comparisons of a trace, and keep them under a name.

    Raises:
        InputError: a comparison is unknown or cannot be good, or they hold nothing to learn from.
    """
    progress("learn", 0, 1)
    _check(trace, comparisons)
    seen = observe(trace, comparisons)
    calibration = Calibration(
        name,
        thresholds_from(seen, name),
        nulls_by_kind(seen.r_by_phase) if seen.r_by_phase else {},
        _sources(trace, comparisons, seen),
        datetime.datetime.now(datetime.timezone.utc).isoformat(),
    )
    write_calibration(trace, name, calibration.as_dict())
    return calibration


def load_calibration(trace: Trace, name: str) -> Calibration:
    """A calibration by its name.

    Raises:
        InputError: there is none, or it cannot be understood.
    """
    fields = read_calibration(trace, name)
    try:
        return Calibration.from_dict(fields)
    except (KeyError, TypeError) as error:
        raise InputError(f"calibration {name!r} lacks {error}; make it anew with 'sleuth calibrate'") from error


def observe(trace: Trace, comparisons: Sequence[str]) -> Observations:
    """Collect what the comparisons measured over all prompts."""
    by_kind: dict[str, list[float]] = {}
    by_phase: dict[str, list[float]] = {}
    relative: list[float] = []
    for row in trace.query(_MEASURED, [list(comparisons)]).to_pylist():
        kind = kind_of(Site(row["module"], row["port"], row["slot"], row["call"]))
        if row["relative_l2"] > 0:
            relative.append(row["relative_l2"])
        if row["r"] is not None and 0 < row["r"] < np.inf:
            by_kind.setdefault(kind, []).append(row["r"])
            by_phase.setdefault(kind_in_phase(kind, row["phase"]), []).append(row["r"])
    logits = trace.query(_LOGITS, [list(comparisons)]).to_pylist()
    if not relative:
        raise InputError(f"comparisons {', '.join(comparisons)} measured nothing; compare complete runs first")
    arrays = [{kind: np.array(values) for kind, values in found.items()} for found in (by_kind, by_phase)]
    return Observations(arrays[0], arrays[1], np.array(relative), logits)


def thresholds_from(seen: Observations, name: str) -> Thresholds:
    """Limits that clean ports like those observed stay within."""
    everything = np.concatenate([np.zeros(0), *seen.r_by_kind.values()])
    floor = _PUBLISHED.tau_r
    tau_r, by_kind = floor, {}
    if len(everything):
        tau_r = float(np.nanmax([floor, np.quantile(everything, 0.99), tolerance_limit(everything)]))
        tolerated = limits_by_kind(seen.r_by_kind)
        by_kind = {
            kind: float(np.nanmax([floor, _SPARE * np.quantile(values, 0.99), tolerated.get(kind, tau_r)]))
            for kind, values in seen.r_by_kind.items()
        }
    worst = _SPARE * float(np.quantile(seen.relative_l2, 0.99))
    return Thresholds(
        tau_r=tau_r,
        theta=1.0 - _beyond([1.0 - row["cosine"] for row in seen.logits], 1.0 - _PUBLISHED.theta),
        delta=min(_beyond([row["kl"] for row in seen.logits], _PUBLISHED.delta), _LARGEST_DELTA),
        top1=_least_share(seen.logits),
        relative_l2=float(np.nanmax([worst, tolerance_limit(seen.relative_l2)])),
        tau_r_by_kind=by_kind,
        calibration=name,
    )


def _beyond(values: Sequence[float], default: float) -> float:
    """A limit above one value per comparison: tolerance limit, between 1.1 and 2 times the largest."""
    if not values:
        return default
    seen = np.maximum(np.array(values, np.float64), 1e-12)
    worst = float(seen.max())
    limit = tolerance_limit(seen)
    return float(np.clip(limit if np.isfinite(limit) else _MOST * worst, _SPARE * worst, _MOST * worst))


def _least_share(logits: Sequence[Mapping[str, Any]]) -> float:
    """Smallest top-1 agreement, less what chance takes in 99 of 100 samples of that size."""
    shares = [row["top1"] - 2.33 * np.sqrt(row["top1"] * (1 - row["top1"]) / row["n"]) for row in logits]
    return float(max(_PUBLISHED.top1, min(shares, default=_PUBLISHED.top1)))


def _check(trace: Trace, comparisons: Sequence[str]) -> None:
    if not comparisons:
        raise InputError("there is nothing to learn from; name known-good runs with --good R,B,T")
    bad = trace.query(_BAD, [list(comparisons)]).to_pylist()
    if bad:
        row = bad[0]
        raise InputError(f"comparison {row['comparison']!r} cannot be known-good: {row['site']} is {row['state']}")


def _sources(trace: Trace, comparisons: Sequence[str], seen: Observations) -> dict[str, Any]:
    """What a calibration came from."""
    from ... import __version__

    rows = trace.query(
        "SELECT comparison, reference, baseline, target FROM comparisons WHERE comparison IN (SELECT unnest(?))",
        [list(comparisons)],
    ).to_pylist()
    names = sorted({row[role] for row in rows for role in ("reference", "baseline", "target") if row[role]})
    manifests = [trace.manifest(run) for run in names]
    return {
        "comparisons": rows,
        "runs": {
            manifest.run: {
                "checkpoint_fingerprint": manifest.provenance.get("checkpoint_fingerprint"),
                "dtype": manifest.dtype,
                "stack": manifest.stack,
                "created_at": manifest.created_at,
            }
            for manifest in manifests
        },
        "n_r": int(sum(len(values) for values in seen.r_by_kind.values())),
        "n_kinds": len(seen.r_by_kind),
        "n_relative_l2": len(seen.relative_l2),
        "n_logits": int(sum(row["n"] for row in seen.logits)),
        "version": __version__,
    }
