"""Every number of a position from its rows of logits: the reference's, the baseline's and the target's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..intervals import EPSILON
from ..moments import BASELINE_EXACT, EXACT, MEASURED, NONFINITE
from ..triples import FloatArray, Triple
from .side import ReferenceRows, SideRows

#: Runners-up whose distance from the first token is kept, for the odds of a flip.
RIVALS = 64
#: Of these, so many of the nearest tell how far the baseline moves them against the first token.
_NEAREST = 10
#: Elements of each run that are widened to float64 at a time (4 MB).
_PIECE = 1 << 19

#: Numbers of a position, float64. With a baseline, those of `_BOTH` also exist with the suffix `_baseline`.
_BOTH = ("cosine", "kl", "js", "top1", "top5", "top10", "error_top5", "error_top50", "error_top1000", "error_all")
_OWN = ("cosine_raw", "p_reference_token", "rank_reference_token", "n_tied")
_COUNTS = ("n_nonfinite_reference", "n_nonfinite_baseline", "n_nonfinite_target")
_TOKENS = ("reference_token", "baseline_token", "target_token")

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Grid:
    """The numbers of a dtype, as far as distances between neighbours go.

    Attributes:
        digits: bits of the fraction.
        least: exponent of the smallest normal number.
    """

    digits: int
    least: int

    @classmethod
    def of(cls, dtype: str) -> Grid:
        """The grid of a float dtype by name; float64's for anything else."""
        try:
            found = ml_dtypes.finfo(dtype)
        except (TypeError, ValueError):
            found = ml_dtypes.finfo(np.float64)
        return cls(int(found.nmant), int(found.minexp))

    def spacing(self, values: FloatArray) -> FloatArray:
        """Unit in the last place at each value: the distance to the next larger magnitude."""
        _, exponent = np.frexp(values)
        return np.asarray(np.ldexp(1.0, np.maximum(exponent - 1, self.least) - self.digits))


def measure_rows(triple: Triple, grid: Grid) -> Columns:
    """Measure every position of a triple.

    Args:
        triple: `[positions, vocabulary]` of the runs; the baseline may be missing.
        grid: of the dtype that the target computes logits in.

    Returns:
        Columns of the `logits` table, one row per position (undefined: NaN), and what the odds of a flip need:
        `margins` `[positions, RIVALS]`, how far the reference's runners-up are behind its first token (infinite where
        there are none); `moved_sq` and `moved_n`, the sum of squares and the number of the baseline's changes to the
        nearest of these distances; `rounding`, the variance that rounding the first two to the grid adds to their
        distance; `behind`, the reference's distance between its own token and the target's; `largest`, the target's
        largest logit.
    """
    sides = [side for side in (triple.reference, triple.baseline, triple.target) if side is not None]
    step = max(1, _PIECE // max(triple.reference.shape[1], 1))
    parts = []
    for start in range(0, len(triple.positions), step):
        piece = slice(start, start + step)
        parts.append(_piece([_widened(side[piece]) for side in sides], grid))
    return joined(parts) | {"position": triple.positions}


def joined(parts: list[Columns]) -> Columns:
    """Columns of several pieces, one behind the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _widened(rows: npt.NDArray[Any]) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return rows.astype(np.float64)


def _piece(sides: list[FloatArray], grid: Grid) -> Columns:
    """All rows at once if every value is finite, else one by one: without the tokens that all runs mask with -inf."""
    if all(np.isfinite(side).all() for side in sides):
        return _finite(sides, grid)
    parts = []
    for row in range(len(sides[0])):
        one = [side[row : row + 1] for side in sides]
        kept = np.flatnonzero(~np.logical_and.reduce([side[0] == -np.inf for side in one]))
        one = [side[:, kept] for side in one]
        bad = [int((~np.isfinite(side)).sum()) for side in one]
        if any(bad) or not len(kept):
            parts.append(_nonfinite(bad))
            continue
        columns = _finite(one, grid)
        parts.append(columns | {name: _renumbered(columns[name], kept) for name in _TOKENS})
    return joined(parts)


def _renumbered(tokens: npt.NDArray[Any], kept: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    return np.where(tokens >= 0, kept[tokens], -1)


def _finite(sides: list[FloatArray], grid: Grid) -> Columns:
    reference = ReferenceRows.of(sides[0])
    target = SideRows.of(reference, sides[-1])
    baseline = SideRows.of(reference, sides[1]) if len(sides) == 3 else None
    n = len(sides[0])
    every = np.arange(n)
    columns = _of_side(reference, target)
    others = _of_side(reference, baseline) if baseline is not None else dict.fromkeys(columns, np.full(n, np.nan))
    first = reference.logits[every, reference.token]
    margins = _margins(reference)
    columns |= {f"{name}_baseline": others[name] for name in _BOTH}
    columns |= {
        "state": _states(target, baseline),
        "reference_norm": np.sqrt(reference.norm_sq),
        "target_error": target.error,
        "baseline_error": np.full(n, np.nan) if baseline is None else baseline.error,
        "p_reference": reference.p[every, reference.token],
        "reference_token": reference.token,
        "target_token": target.token,
        "baseline_token": np.full(n, -1, np.int64) if baseline is None else baseline.token,
        "margins": margins,
        "margin_ulp": _finite_or_nan(margins[:, 0] / grid.spacing(first)),
        "rounding": (grid.spacing(first) ** 2 + grid.spacing(first - _zero_if_infinite(margins[:, 0])) ** 2) / 12.0,
        "behind": first - reference.logits[every, target.token],
        "largest": target.largest,
        **{name: np.zeros(n, np.int64) for name in _COUNTS},
    }
    return columns | _ratios(reference, target, baseline) | _moved(reference, baseline)


def _of_side(reference: ReferenceRows, side: SideRows) -> Columns:
    top5, top10 = side.overlaps
    return {
        "cosine": side.cosine,
        "cosine_raw": side.cosine_raw,
        "kl": side.kl,
        "js": side.js,
        "top1": (side.token == reference.token).astype(np.float64),
        "top5": top5,
        "top10": top10,
        **dict(zip(_BOTH[6:], side.top_errors, strict=True)),
        "p_reference_token": side.p_token,
        "rank_reference_token": side.rank,
        "n_tied": side.n_tied,
    }


def _margins(reference: ReferenceRows) -> FloatArray:
    nearest = reference.at(reference.top[:, : RIVALS + 1])
    margins = np.full((len(nearest), RIVALS), np.inf)
    margins[:, : nearest.shape[1] - 1] = nearest[:, :1] - nearest[:, 1:]
    return margins


def _moved(reference: ReferenceRows, baseline: SideRows | None) -> Columns:
    """How the baseline changes the distances between the first token and those behind it."""
    chosen = reference.top[:, : _NEAREST + 1]
    n, count = len(chosen), chosen.shape[1] - 1
    if baseline is None:
        return {"moved_sq": np.full(n, np.nan), "moved_n": np.zeros(n, np.int64)}
    errors = np.take_along_axis(baseline.errors, chosen, axis=1)
    return {
        "moved_sq": ((errors[:, 1:] - errors[:, :1]) ** 2).sum(axis=1),
        "moved_n": np.full(n, count, np.int64),
    }


def _ratios(reference: ReferenceRows, target: SideRows, baseline: SideRows | None) -> Columns:
    """R = ||t - r|| / (||b - r|| + 1e-12 ||r||), centred and raw; NaN for 0 / 0, infinite if only b is exact."""
    if baseline is None:
        return dict.fromkeys(("r_ratio", "r_raw"), np.full(len(target.error), np.nan))
    return {
        "r_ratio": _ratio(target.error, baseline.error, np.sqrt(reference.norm_sq)),
        "r_raw": _ratio(target.error_raw, baseline.error_raw, np.sqrt(reference.norm_raw_sq)),
    }


def _ratio(target: FloatArray, baseline: FloatArray, norm: FloatArray) -> FloatArray:
    floor = np.where(baseline > 0.0, baseline + EPSILON * norm, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return target / floor


def _states(target: SideRows, baseline: SideRows | None) -> npt.NDArray[Any]:
    """By raw errors: a shift of all logits is a difference, though a harmless one."""
    same = target.error_raw == 0.0
    if baseline is None:
        return np.where(same, EXACT, MEASURED)
    return np.where(baseline.error_raw > 0.0, MEASURED, np.where(same, EXACT, BASELINE_EXACT))


def _nonfinite(bad: list[int]) -> Columns:
    nothing = np.full(1, np.nan)
    numbers = (*_BOTH, *_OWN, *(f"{name}_baseline" for name in _BOTH), "reference_norm", "target_error",
               "baseline_error", "p_reference", "margin_ulp", "rounding", "behind", "largest", "r_ratio", "r_raw",
               "moved_sq")  # fmt: skip
    counts = (bad[0], bad[1] if len(bad) == 3 else 0, bad[-1])
    return {
        **dict.fromkeys(numbers, nothing),
        **dict.fromkeys(_TOKENS, np.full(1, -1, np.int64)),
        **{name: np.array([count]) for name, count in zip(_COUNTS, counts, strict=True)},
        "state": np.array([NONFINITE]),
        "margins": np.full((1, RIVALS), np.nan),
        "moved_n": np.zeros(1, np.int64),
    }


def _finite_or_nan(values: FloatArray) -> FloatArray:
    return np.where(np.isfinite(values), values, np.nan)


def _zero_if_infinite(values: FloatArray) -> FloatArray:
    return np.where(np.isfinite(values), values, 0.0)
