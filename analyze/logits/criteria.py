"""Pass criteria for next-token distributions, over all positions and per phase.

Four are those that AWS's Equivalence skill publishes: percentiles of R, cosine and KL, and top-1 agreement. Percentiles
cannot see a few bad positions among many. So the others hold the worst position, the number of flips and the pooled
error against what the baseline shows that precision alone does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.stats import t as student

from ..intervals import EPSILON, interval_over_prompts
from ..moments import BASELINE_EXACT
from ..triples import FloatArray
from ..verdict import FAIL, PASS, UNDECIDED, Thresholds
from .chance import count_limit
from .distributions import Grid

#: Worst errors of two equally good runs differ by less than this factor; KL, quadratic in the error, by its square.
TAIL = 3.0
#: A clean port exceeds a limit on counts or on the largest R with about this probability.
CHANCE = 1e-3
#: 99 % reach of log p95 + log p5 of n normal values, in standard deviations over the square root of n.
_QUANTILE_ERROR = 7.0
#: A flip over a distance of more standard deviations of the baseline's error is not rounding.
FLIP_SIGMAS = 8.0
#: Largest errors that NxD Inference's logit check allows among the 5, 50, 1000 likeliest tokens and all.
NXDI_TOLERANCES = {"error_top5": 0.01, "error_top50": 0.02, "error_top1000": 0.03, "error_all": 0.05}
_NXDI_NAMES = {"error_top5": "top 5", "error_top50": "top 50", "error_top1000": "top 1000", "error_all": "all tokens"}


@dataclass(frozen=True)
class Criterion:
    """One criterion in one scope.

    Attributes:
        scope: `all` or a phase.
        name: short key.
        meaning: what the value is.
        published: whether it is one of the Equivalence skill's.
        value: of the target; None: undefined.
        sense: how the value must stand to the limit: `<`, `<=`, `>`, `>=`.
        limit: None: none could be set.
        baseline: the same number of the baseline, None without one.
        verdict: pass, fail or undecided.
        note: why the verdict is not simply the comparison of value and limit; may be empty.
    """

    scope: str
    name: str
    meaning: str
    published: bool
    value: float | None
    sense: str
    limit: float | None
    baseline: float | None
    verdict: str
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the value keeps the limit to the letter; None where either is missing."""
        return keeps(self.value, self.sense, self.limit)


def keeps(value: float | None, sense: str, limit: float | None) -> bool | None:
    """Whether a value keeps a limit."""
    if value is None or limit is None:
        return None
    return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[sense]


class Positions:
    """Rows of one scope as arrays: those that have numbers, and how many do not."""

    def __init__(self, scope: str, rows: pa.Table, has_baseline: bool, dtype: str) -> None:
        """`rows`: of the `logits` table."""
        finite = np.array([state != "nonfinite" for state in rows["state"].to_pylist()], bool)
        self.scope, self.n, self.has_baseline, self.dtype = scope, rows.num_rows, has_baseline, dtype
        self._rows = rows.filter(pa.array(finite))
        self.n_finite = self._rows.num_rows
        bad = {name: int((rows[f"n_nonfinite_{name}"].to_numpy() > 0).sum()) for name in ("reference", "target")}
        self.n_bad_target, self.n_bad_reference = bad["target"], bad["reference"]
        self.prompts = self._rows["prompt"].to_numpy()
        self.states = set(self._rows["state"].to_pylist())

    def __getitem__(self, name: str) -> FloatArray:
        """A column; undefined: NaN."""
        return np.asarray(self._rows[name].to_numpy(zero_copy_only=False), np.float64)

    def quantile(self, name: str, q: float) -> float | None:
        """A quantile over the positions where the number is defined; linear, or the larger one beside infinities."""
        values = self[name]
        values = values[~np.isnan(values)]
        if not len(values):
            return None
        return float(np.quantile(values, q, method="linear" if np.isfinite(values).all() else "higher"))

    def by_prompt(self) -> list[FloatArray]:
        """Per prompt `float64[positions, 3]`: squares of centred norm, baseline error and target error."""
        squares = np.stack([self[name] for name in ("reference_norm", "baseline_error", "target_error")], 1) ** 2
        return [squares[self.prompts == prompt] for prompt in np.unique(self.prompts)]


def evaluate(positions: Positions, thresholds: Thresholds) -> list[Criterion]:
    """Every criterion of one scope."""
    found = [_nonfinite(positions)]
    if not positions.n_finite:
        return found
    found += _published(positions, thresholds)
    found += _pooled(positions, thresholds)
    found += _worst(positions, thresholds)
    if positions.has_baseline:
        found += _flips(positions)
    return found


def r_limit(positions: Positions, thresholds: Thresholds) -> float:
    """The largest R that the positions of a clean port show.

    Baseline and target are exchangeable for a clean port, so log R scatters alike above and below its median. The lower
    half tells how much, whatever a few bad positions do to the upper one. The limit is that many spreads above the
    median (which may not itself be beyond tau_R) as one clean port in a thousand exceeds, by Student's t.
    """
    log_r = _log(positions["r_ratio"])
    floor = thresholds.tau_r**2
    if len(log_r) < 3:
        return float("inf")
    middle = float(np.median(log_r))
    reach = float(student.ppf(1.0 - CHANCE / len(log_r), max((len(log_r) - 1) // 2, 1)))
    centre = float(np.clip(middle, 0.0, np.log(thresholds.tau_r)))
    return max(floor, float(np.exp(min(centre + reach * _spread(log_r), 700.0))))


def _spread(log_r: FloatArray) -> float:
    """Standard deviation of the lower half, about the median."""
    if not len(log_r):
        return 0.0
    middle = np.median(log_r)
    return float(np.sqrt(((log_r[log_r <= middle] - middle) ** 2).mean()))


def _log(ratios: FloatArray) -> FloatArray:
    return np.log(ratios[np.isfinite(ratios) & (ratios > 0.0)])


def worst_limits(positions: Positions, thresholds: Thresholds) -> dict[str, float]:
    """Limits for single positions: KL, cosine and (with a baseline) R; the baseline's own worst may widen them."""
    kl, cosine = thresholds.delta, 1.0 - thresholds.theta
    if positions.has_baseline:
        kl = max(kl, TAIL**2 * (positions.quantile("kl_baseline", 1.0) or 0.0))
        cosine = max(cosine, TAIL**2 * (1.0 - _or(positions.quantile("cosine_baseline", 0.0), 1.0)))
    limits = {"kl": kl, "cosine": 1.0 - cosine}
    if positions.has_baseline:
        limits["r_ratio"] = r_limit(positions, thresholds)
    return limits


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _nonfinite(positions: Positions) -> Criterion:
    value, also = float(positions.n_bad_target), float(positions.n_bad_reference)
    verdict = PASS if not value else FAIL
    note = ""
    if positions.n_finite < positions.n and verdict == PASS:
        verdict, note = UNDECIDED, "NaN or infinite logits in the reference or the baseline"
    elif value and also:
        note = f"{also:.0f} positions of the reference have some too"
    meaning = "positions with NaN or infinite logits"
    return Criterion(positions.scope, "nonfinite", meaning, False, value, "<=", 0.0, None, verdict, note)


def _published(positions: Positions, limits: Thresholds) -> Iterator[Criterion]:
    scope = positions.scope
    if positions.has_baseline:
        yield _r_percentile(positions, limits.tau_r)
    slack = limits.tau_r**2  # KL and 1 - cosine are quadratic in the error
    cosine, mine = positions.quantile("cosine", 0.05), positions.quantile("cosine_baseline", 0.05)
    excused = mine is not None and cosine is not None and 1.0 - cosine <= slack * (1.0 - mine)
    yield _judged(
        scope, "cosine_p5", "cosine of centred logits, 5th percentile", cosine, ">=", limits.theta, mine, excused
    )
    kl, base = positions.quantile("kl", 0.95), positions.quantile("kl_baseline", 0.95)
    excused = base is not None and kl is not None and kl <= slack * base
    yield _judged(scope, "kl_p95", "KL divergence, 95th percentile, nats", kl, "<=", limits.delta, base, excused)
    rate, other = float(positions["top1"].mean()), _mean(positions["top1_baseline"])
    excused = other is not None and rate >= other - 2.0 * np.sqrt(max(other * (1.0 - other), 0.0) / positions.n_finite)
    yield _judged(scope, "top1_rate", "share of positions with the same first token", rate, ">", limits.top1, other,
                  bool(excused))  # fmt: skip


def _judged(
    scope: str, name: str, meaning: str, value: float | None, sense: str, limit: float, baseline: float | None,
    excused: bool,
) -> Criterion:  # fmt: skip
    """A published criterion; it also passes if the baseline does no better."""
    holds = keeps(value, sense, limit)
    verdict = UNDECIDED if holds is None else PASS if holds or excused else FAIL
    note = "beyond the limit, as is the baseline: the precision, not the port" if excused and holds is False else ""
    return Criterion(scope, name, meaning, True, value, sense, limit, baseline, verdict, note)


def _r_percentile(positions: Positions, tau_r: float) -> Criterion:
    """R of single positions scatters in a clean port, too: as far above 1 as below it, by exchangeability."""
    high, low = positions.quantile("r_ratio", 0.95), positions.quantile("r_ratio", 0.05)
    verdict, note = PASS, ""
    if high is None:
        note = "both errors are 0 everywhere"
    elif not high < tau_r:
        mirrored = high * low if low else float("inf")
        log_r = _log(positions["r_ratio"])
        doubt = float(np.exp(_QUANTILE_ERROR * _spread(log_r) / np.sqrt(max(len(log_r), 1))))
        verdict = PASS if mirrored < tau_r else UNDECIDED if mirrored < tau_r * doubt else FAIL
        if verdict != FAIL and low:
            note = f"two equally good runs scatter this much: 5th percentile {low:.3g}, mirrored {1.0 / low:.3g}"
            note += "; too few positions to tell" if verdict == UNDECIDED else ""
    meaning = "R of a position, 95th percentile"
    return Criterion(positions.scope, "r_p95", meaning, True, high, "<", tau_r, 1.0, verdict, note)


def _pooled(positions: Positions, thresholds: Thresholds) -> Iterator[Criterion]:
    """The error of all positions together, judged like that of any site."""
    squares = np.concatenate(positions.by_prompt())
    reference, baseline, target = (float(np.sqrt(value)) for value in squares.sum(axis=0))
    relative = target / reference if reference else 0.0 if not target else float("inf")
    if not positions.has_baseline:
        if thresholds.relative_l2 is not None:
            verdict = PASS if relative <= thresholds.relative_l2 else FAIL
            meaning = "relative L2 error of centred logits"
            limit = thresholds.relative_l2
            yield Criterion(positions.scope, "relative_l2", meaning, False, relative, "<=", limit, None, verdict)
        return
    if not target:
        ratio, verdict, note = None, PASS, "equal to the last bit"
    elif not baseline:  # the reference computes its logits without rounding: a clean port may round them once
        ratio, verdict = float("inf"), PASS if relative <= 2.0 ** -(Grid.of(positions.dtype).digits + 1) else FAIL
        note = f"the baseline is exact; relative error {relative:.2g}"
    else:
        ratio = target / (baseline + EPSILON * reference)
        low, high = interval_over_prompts(positions.by_prompt())
        verdict = PASS if ratio < thresholds.tau_r else UNDECIDED if low <= 1.0 else FAIL
        note = "" if np.isnan(low) else f"95 % interval {low:.3g} to {high:.3g}"
    meaning = "R of all positions"
    yield Criterion(positions.scope, "r_pooled", meaning, False, ratio, "<", thresholds.tau_r, 1.0, verdict, note)


def _worst(positions: Positions, thresholds: Thresholds) -> Iterator[Criterion]:
    limits = worst_limits(positions, thresholds)
    if "r_ratio" in limits and np.isfinite(limits["r_ratio"]):
        finite_or_exact = positions["r_ratio"]
        if BASELINE_EXACT in positions.states:
            finite_or_exact = finite_or_exact[np.isfinite(finite_or_exact)]
        value = float(np.nanmax(finite_or_exact)) if (~np.isnan(finite_or_exact)).any() else None
        yield _own(positions.scope, "r_max", "R of a position, largest", value, "<=", limits["r_ratio"], 1.0)
    cosine, base = positions.quantile("cosine", 0.0), positions.quantile("cosine_baseline", 0.0)
    yield _own(
        positions.scope, "cosine_min", "cosine of centred logits, smallest", cosine, ">=", limits["cosine"], base
    )
    kl, mine = positions.quantile("kl", 1.0), positions.quantile("kl_baseline", 1.0)
    yield _own(positions.scope, "kl_max", "KL divergence, largest, nats", kl, "<=", limits["kl"], mine)
    for name, limit in NXDI_TOLERANCES.items():
        error, other = positions.quantile(name, 1.0), positions.quantile(f"{name}_baseline", 1.0)
        allowed = max(limit, TAIL * (other or 0.0))
        meaning = f"largest error over largest logit, {_NXDI_NAMES[name]}"
        yield _own(positions.scope, name, meaning, error, "<=", allowed, other)


def _own(
    scope: str, name: str, meaning: str, value: float | None, sense: str, limit: float, baseline: float | None
) -> Criterion:
    verdict = FAIL if keeps(value, sense, limit) is False else PASS
    return Criterion(scope, name, meaning, False, value, sense, limit, baseline, verdict)


def _flips(positions: Positions) -> Iterator[Criterion]:
    odds = positions["flip_expected"]
    odds = odds[~np.isnan(odds)]
    flips, base = (int(np.sum(positions[name] == 0.0)) for name in ("top1", "top1_baseline"))
    expected = float(odds.sum())
    if base > expected > 0.0:  # where the model expects too few, the baseline says so
        odds = np.minimum(odds * base / expected, 1.0)
    limit = float(count_limit(odds, CHANCE))
    note = f"{expected:.3g} expected from the margins and the baseline's error"
    meaning = "positions with another first token"
    verdict = PASS if flips <= limit else FAIL
    yield Criterion(positions.scope, "flips", meaning, False, float(flips), "<=", limit, float(base), verdict, note)
    sigmas = positions.quantile("flip_sigma", 1.0)
    meaning = "largest lead that a flip overcame, in deviations of rounding"
    yield _own(positions.scope, "flip_sigma_max", meaning, _or(sigmas, 0.0), "<=", FLIP_SIGMAS, None)


def scopes(rows: pa.Table, phases: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """All rows, and those of every phase if there are several."""
    yield "all", rows
    if len(phases) > 1:
        for phase in phases:
            yield phase, rows.filter(pa.compute.equal(rows["phase"], phase))
