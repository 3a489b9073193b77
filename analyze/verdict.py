"""Thresholds, and the verdicts they lead to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .moments import BASELINE_EXACT, EXACT, NONFINITE

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
SHAPE_MISMATCH = "shape_mismatch"

#: Unit roundoff of the dtypes a target may run in: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Thresholds:
    """Limits that a site or a model must keep.

    Attributes:
        tau_r: largest R of a site; 1.2 as in AWS's Equivalence skill.
        theta: smallest cosine of centred logits.
        delta: largest KL divergence of the next-token distributions, in nats.
        top1: smallest share of positions with the same most likely token.
        relative_l2: largest relative L2 error in a comparison without a baseline; None with one.
    """

    tau_r: float = 1.2
    theta: float = 0.95
    delta: float = 0.1
    top1: float = 0.5
    relative_l2: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """JSON-ready fields."""
        return asdict(self)


def site_verdict(
    state: str,
    r_ratio: float,
    r_low: float,
    relative_l2: float,
    target_nonfinite: bool,
    thresholds: Thresholds,
    target_dtype: str,
) -> str:
    """Judge one measurement.

    - `exact` passes; a `shape_mismatch` fails.
    - `nonfinite` fails when the target has NaN or infinities of its own; when only the reference or the baseline has,
      nothing can be said.
    - integers that differ are undecided: they are indices (experts, tokens), whose distance means nothing; a tie
      broken the other way and a wrong choice look the same from here.
    - `baseline_exact`: the reference computes this site without rounding (a lookup, a copy). The target passes if it
      stays within one unit roundoff of its dtype, since rounding the stored values is all it may add.
    - `measured`: R above tau_r fails, unless its interval reaches down to 1: then there are too few tokens to tell.
    - without a baseline, relative L2 is held against its own limit.

    Args:
        state: state of the measurement.
        r_ratio: R.
        r_low: lower end of its interval, NaN when there is none.
        relative_l2: relative error of the target.
        target_nonfinite: the target holds non-finite values that the reference does not.
        thresholds: limits.
        target_dtype: dtype of the target's tensors by name.
    """
    if state == SHAPE_MISMATCH:
        return FAIL
    if state == EXACT:
        return PASS
    if state == NONFINITE:
        return FAIL if target_nonfinite else UNDECIDED
    if target_dtype.startswith(("int", "uint")):
        return UNDECIDED
    if thresholds.relative_l2 is not None:
        return PASS if relative_l2 <= thresholds.relative_l2 else FAIL
    if state == BASELINE_EXACT:
        return PASS if relative_l2 <= UNIT_ROUNDOFF.get(target_dtype, 0.0) else FAIL
    if r_ratio < thresholds.tau_r:
        return PASS
    return UNDECIDED if not math.isnan(r_low) and r_low <= 1.0 else FAIL


def overall_verdict(sites: Sequence[str], n_unmatched: int, doubts: Sequence[str]) -> tuple[str, list[str]]:
    """Judge a comparison.

    Args:
        sites: verdicts of its sites.
        n_unmatched: holes in the coverage.
        doubts: reasons not to trust the runs, such as a capture that changed the logits.

    Returns:
        `fail` if any site fails; else `undecided` if anything is open; else `pass`; and the reasons.
    """
    reasons = list(doubts)
    failed, undecided = sites.count(FAIL), sites.count(UNDECIDED)
    if failed:
        reasons.insert(0, f"{failed} of {len(sites)} measurements fail")
    if undecided:
        reasons.append(f"{undecided} of {len(sites)} measurements are undecided")
    if n_unmatched:
        reasons.append(f"{n_unmatched} sites of the reference have no counterpart in the target")
    if not sites:
        reasons.append("nothing could be compared")
    if failed:
        return FAIL, reasons
    return (UNDECIDED, reasons) if undecided or n_unmatched or doubts or not sites else (PASS, reasons)
