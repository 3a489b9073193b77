"""The metrics that follow from sums: norms, R, cosine, spread, and the best affine fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import rows
from .intervals import EPSILON
from .quantiles import ratio
from .triples import FloatArray

MEASURED, EXACT, BASELINE_EXACT, NONFINITE = "measured", "exact", "baseline_exact", "nonfinite"


@dataclass(frozen=True, slots=True)
class Moments:
    """Metrics of one comparison that need one pass; r, b, t = reference, baseline, target, e = t - r.

    n: elements compared. Elements where r, b and t hold the same non-finite value (the same infinity, or all NaN:
        masks) are left out and counted in n_excluded.
    state: 'exact' (both errors 0; also when n is 0), 'baseline_exact' (only the baseline's error is 0),
        'nonfinite' (a NaN or infinity that the three do not share, or a difference beyond float64: every metric
        is NaN and n_nonfinite_* say where), else 'measured'.
    reference_norm, baseline_error, target_error: ||r||, ||b - r||, ||t - r||, Frobenius.
    r_ratio: R = target_error / (baseline_error + 1e-12 reference_norm); NaN when exact, inf when baseline_exact.
    relative_l2, relative_l2_baseline: ||t - r|| / ||r||, ||b - r|| / ||r||.
    cosine: <t, r> / (||t|| ||r||); NaN when either norm is 0.
    max_abs_error, linf_ratio: max|t - r|, and that over max|b - r|.
    baseline_std, target_std, sigma_ratio: standard deviations (about the mean, over n) of b - r and t - r, and
        target_std / baseline_std.
    mean_error: mean(t - r).
    fit_scale, fit_offset: least squares t ~ scale r + offset; NaN when r is constant (no scale is better than
        another).
    fit_residual: ||t - (scale r + offset)|| / (baseline_error + 1e-12 reference_norm): R after the best fit;
        inf when baseline_exact. Its square comes from sums, so below about 1e-7 of R it is rounding.

    Quotients are inf for x / 0 and NaN for 0 / 0. What needs the baseline is NaN without one.
    """

    n: int
    n_excluded: int
    n_nonfinite_reference: int
    n_nonfinite_baseline: int
    n_nonfinite_target: int
    state: str
    reference_norm: float
    baseline_error: float
    target_error: float
    r_ratio: float
    relative_l2: float
    relative_l2_baseline: float
    cosine: float
    max_abs_error: float
    linf_ratio: float
    baseline_std: float
    target_std: float
    sigma_ratio: float
    mean_error: float
    fit_scale: float
    fit_offset: float
    fit_residual: float


def moments_of(row: FloatArray, has_baseline: bool) -> Moments:
    """Metrics from one folded row of sums, `float64[rows.COLUMNS]`."""
    nan = float("nan")
    state = _state(row, has_baseline)
    values = row.copy()
    if state == NONFINITE or row[rows.COUNT] == 0:
        values[:] = nan
    elif not has_baseline:
        values[[rows.BASELINE_SQ, rows.MAX_BASELINE, rows.BASELINE_VAR]] = nan
    n = float(row[rows.COUNT]) or nan
    reference, baseline, target = (
        float(np.sqrt(values[column])) for column in (rows.REFERENCE_SQ, rows.BASELINE_SQ, rows.TARGET_SQ)
    )
    target_norm = float(np.sqrt(values[rows.TARGET_NORM_SQ]))
    baseline_std = float(np.sqrt(values[rows.BASELINE_VAR] / n))
    target_std = float(np.sqrt(values[rows.TARGET_VAR] / n))
    scale, offset, residual = _affine_fit(values)
    floor = baseline + EPSILON * reference if baseline else 0.0
    return Moments(
        n=int(row[rows.COUNT]),
        n_excluded=int(row[rows.EXCLUDED]),
        n_nonfinite_reference=int(row[rows.BAD_REFERENCE]),
        n_nonfinite_baseline=int(row[rows.BAD_BASELINE]),
        n_nonfinite_target=int(row[rows.BAD_TARGET]),
        state=state,
        reference_norm=reference,
        baseline_error=baseline,
        target_error=target,
        r_ratio=ratio(target, floor),
        relative_l2=ratio(target, reference),
        relative_l2_baseline=ratio(baseline, reference),
        cosine=_cosine(float(values[rows.PRODUCT]), target_norm, reference),
        max_abs_error=float(values[rows.MAX_TARGET]),
        linf_ratio=ratio(float(values[rows.MAX_TARGET]), float(values[rows.MAX_BASELINE])),
        baseline_std=baseline_std,
        target_std=target_std,
        sigma_ratio=ratio(target_std, baseline_std),
        mean_error=float(values[rows.SHIFT_TARGET]),
        fit_scale=scale,
        fit_offset=offset,
        fit_residual=ratio(residual, floor),
    )


def _state(row: FloatArray, has_baseline: bool) -> str:
    """Judged by the largest errors: squares of errors below 1e-162 would vanish."""
    largest_baseline, largest_target = row[rows.MAX_BASELINE], row[rows.MAX_TARGET]
    if row[rows.BAD] > 0 or not np.isfinite([largest_baseline, largest_target]).all():
        return NONFINITE
    if has_baseline and largest_baseline > 0:
        return MEASURED
    if largest_target == 0:
        return EXACT
    return BASELINE_EXACT if has_baseline else MEASURED


def _cosine(product: float, target_norm: float, reference_norm: float) -> float:
    if target_norm == 0.0 or reference_norm == 0.0:
        return float("nan")
    return float(np.clip(product / target_norm / reference_norm, -1.0, 1.0))


def _affine_fit(values: FloatArray) -> tuple[float, float, float]:
    """Scale, offset and residual norm of t ~ scale r + offset, from the sums of e = t - r.

    e ~ a r + c has a = cov(r, e) / var(r) and c = mean(e) - a mean(r); then scale = 1 + a, offset = c, and the
    residual is the same. Working on e keeps the digits that t and r share out of the subtraction.
    """
    variance, covariance = values[rows.REFERENCE_VAR], values[rows.FIT_COV]
    spread = values[rows.TARGET_VAR]
    if variance == 0.0:
        return float("nan"), float("nan"), float(np.sqrt(spread))
    slope = covariance / variance
    offset = values[rows.SHIFT_TARGET] - slope * values[rows.SHIFT_REFERENCE]
    residual = np.sqrt(np.maximum(spread - slope * covariance, 0.0))
    return float(1.0 + slope), float(offset), float(residual)
