"""Thresholds, and the verdicts they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .moments import BASELINE_EXACT, EXACT, NONFINITE

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
SHAPE_MISMATCH = "shape_mismatch"

#: Largest share of false alarms that is accepted among the sites that are called divergent.
ALPHA = 0.05

#: A null that allows more than this says nothing: however wide it is, a larger R is not passed.
CEILING = 2.0

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
        tau_r_by_kind: largest R at sites of some kinds (paths within a layer), where it is not `tau_r`.
        calibration: name of the calibration that the limits come from; None for defaults or the user's own.
    """

    tau_r: float = 1.2
    theta: float = 0.95
    delta: float = 0.1
    top1: float = 0.5
    relative_l2: float | None = None
    tau_r_by_kind: Mapping[str, float] = field(default_factory=dict)
    calibration: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    def adapted(self, tau_r: float | None, relative_l2: float | None, has_baseline: bool) -> Thresholds:
        """The limits for one comparison: the user's own where given, and relative L2 only without a baseline."""
        limits = self if tau_r is None else replace(self, tau_r=tau_r, tau_r_by_kind={})
        if relative_l2 is not None or has_baseline:
            limits = replace(limits, relative_l2=relative_l2)
        return limits

    def limit(self, kind: str) -> float:
        """Largest R of a site of this kind."""
        return self.tau_r_by_kind.get(kind, self.tau_r)


def settled_verdict(
    state: str, relative_l2: float, target_nonfinite: bool, thresholds: Thresholds, target_dtype: str
) -> str | None:
    """Judge one measurement without R; None where R decides.

    - `exact` passes; a `shape_mismatch` fails.
    - `nonfinite` fails when the target has NaN or infinities of its own; when only the reference or the baseline has,
      nothing can be said.
    - integers that differ are undecided: they are indices (experts, tokens), whose distance means nothing. Those of a
      router are judged by `flips_verdict` instead.
    - `baseline_exact`: the reference computes this site without rounding (a lookup, a copy). The target passes if it
      stays within one unit roundoff of its dtype, since rounding the stored values is all it may add.
    - without a baseline, relative L2 is held against its own limit.

    Args:
        state: state of the measurement.
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
    return None


def r_verdict(
    r_ratio: float, limit: float, q_value: float, r_low: float = float("nan"), *, tolerated: float | None = None
) -> str:
    """Judge R: above its limit it fails, unless chance could have made it so large; then there are too few tokens.

    Replicates may raise the limit above what is tolerated in any case. In between, R passes unless it is significant
    even so: that few replicates were captured is no reason to pass it.

    A handful of prompts can never be significant among hundreds of sites, since the smallest p-value that they allow
    is 2^-prompts. Where the whole interval of R lies beyond `CEILING`, and beyond the limit, that is no excuse either.

    Args:
        r_ratio: R over the tokens that count.
        limit: largest R of a clean site.
        q_value: false-discovery rate at which the site would be called divergent; NaN when nothing tells it, for
            example at a single token.
        r_low: lower end of the 95 % interval of R over the tokens that count; NaN where there is none.
        tolerated: R up to which a site passes in any case; `limit` when None.
    """
    if r_ratio < (limit if tolerated is None else tolerated):
        return PASS
    if r_ratio < limit:
        return UNDECIDED if q_value <= ALPHA else PASS
    return FAIL if q_value <= ALPHA or r_low > max(limit, CEILING) else UNDECIDED


def flips_verdict(p_value: float, q_value: float) -> str:
    """Judge the experts that a router chose: pass unless more tokens are sent elsewhere than chance explains."""
    if q_value <= ALPHA:
        return FAIL
    return UNDECIDED if p_value <= ALPHA else PASS


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
