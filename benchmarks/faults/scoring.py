"""Scores: detection, origin, cause and false alarms, with 95 % intervals, beside those of the published rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .bench import Report
from .causes import accepted, class_of_size, published_class
from .effect import Truth
from .fault import Fault, Severity, label

TAU_R = 1.2
UNNAMED = frozenset({"", "unknown", "inherited"})
#: From this confidence on a wrong cause is a defect.
CONFIDENT = 0.5


@dataclass(frozen=True)
class Outcome:
    """What became of one planted bug.

    Attributes:
        architecture, fault, severity: which.
        cause: what it is.
        visible, size, phase, origins: see `effect.Truth`.
        early: effect before its own place, which should be none.
        verdict: of comparison and diagnosis together.
        compared: of the comparison alone.
        origin_rank: rank of the first right suspect, 0 for none.
        first: the first suspect's module and phase.
        named: cause of the first finding.
        confidence: of that finding.
        cause_right: the first finding names a right cause.
        published_detected, published_primary, published_class_right: the published rules on the same measurements.
        errors: stages that raised.
        seconds: wall time by stage.
        folder: its trace, where it was kept.
    """

    architecture: str
    fault: str
    severity: str
    cause: str
    visible: bool
    size: float
    phase: str
    origins: tuple[str, ...]
    early: float
    verdict: str
    compared: str
    origin_rank: int
    first: str
    named: str
    confidence: float
    cause_right: bool
    published_detected: bool
    published_primary: str
    published_origin_right: bool
    published_class_right: bool
    errors: dict[str, str]
    seconds: dict[str, float]
    folder: str

    @property
    def detected(self) -> bool:
        """Whether the comparison fails, or a cause is named."""
        return self.verdict == "fail"

    @property
    def confident_wrong(self) -> bool:
        """Whether a cause is named with confidence, and wrong."""
        return not self.cause_right and self.named not in UNNAMED and self.confidence >= CONFIDENT


@dataclass(frozen=True)
class CleanOutcome:
    """What was said about a correct port.

    Attributes:
        architecture, variant: which.
        verdict: of comparison and diagnosis together.
        n_suspects: suspects.
        named: cause of the first confident finding.
        largest_r, largest_module: the largest R and where.
        published_detected: some R is above 1.2.
        n_sites, n_failing: measurements over all prompts, and those that fail.
    """

    architecture: str
    variant: str
    verdict: str
    n_suspects: int
    named: str
    largest_r: float
    largest_module: str
    published_detected: bool
    n_sites: int
    n_failing: int
    n_published: int
    errors: dict[str, str]
    seconds: dict[str, float]
    folder: str


def is_origin(module: str, expected: Truth) -> bool:
    """Whether a module is one of those that name a bug's place; `expected` may hold globs."""
    return any(fnmatchcase(module, origin) for origin in expected.origins)


def judge(architecture: str, fault: Fault, severity: Severity, expected: Truth, report: Report) -> Outcome:
    """Hold a report against what was planted."""
    right = [
        number
        for number, suspect in enumerate(report.suspects, 1)
        if is_origin(suspect.module, expected) and suspect.phase in expected.phases
    ]
    cause = fault.cause_of(severity)
    first = report.suspects[0] if report.suspects else None
    finding = report.findings[0] if report.findings else None
    primary = published_primary(report)
    return Outcome(
        architecture=architecture,
        fault=fault.name,
        severity=label(severity),
        cause=cause,
        visible=expected.visible,
        size=expected.size,
        phase=expected.phase,
        origins=expected.origins,
        early=expected.early,
        verdict=report.verdict,
        compared=report.compared,
        origin_rank=right[0] if right else 0,
        first=f"{first.site} ({first.phase})" if first else "",
        named=finding.cause if finding else "",
        confidence=finding.confidence if finding else 0.0,
        cause_right=finding is not None and accepted(cause, finding.cause),
        published_detected=any(exceeds(row[2]) for row in report.measured),
        published_primary=f"{primary[0]} ({primary[1]})" if primary else "",
        published_origin_right=primary is not None
        and is_origin(primary[0], expected)
        and primary[1] in expected.phases,
        published_class_right=primary is not None and class_of_size(primary[2]) == published_class(cause),
        errors=report.errors,
        seconds=report.seconds,
        folder=report.folder,
    )


def judge_clean(architecture: str, variant: str, report: Report) -> CleanOutcome:
    """Count what was wrongly said about a correct port."""
    finite = [row for row in report.measured if row[2] is not None]
    largest = max(finite, key=lambda row: row[2], default=("", "", math.nan, ""))
    confident = [f for f in report.findings if f.cause not in UNNAMED and f.confidence >= CONFIDENT]
    return CleanOutcome(
        architecture=architecture,
        variant=variant,
        verdict=report.verdict,
        n_suspects=len(report.suspects),
        named=confident[0].cause if confident else "",
        largest_r=largest[2],
        largest_module=f"{largest[0]} ({largest[1]})",
        published_detected=any(exceeds(row[2]) for row in report.measured),
        n_sites=len(report.measured),
        n_failing=sum(row[3] == "fail" for row in report.measured),
        n_published=sum(exceeds(row[2]) for row in report.measured),
        errors=report.errors,
        seconds=report.seconds,
        folder=report.folder,
    )


def exceeds(r_ratio: float | None) -> bool:
    """The published rule for one component."""
    return r_ratio is not None and r_ratio > TAU_R


def published_primary(report: Report) -> tuple[str, str, float] | None:
    """Module, phase and R of the published rules' primary fault.

    A failing component is a step if the next two fail as well; the primary fault is the step with the largest R.
    """
    steps = []
    for phase in ("prefill", "decode"):
        rows = [row for row in report.measured if row[1] == phase and row[2] is not None]
        failing = [exceeds(row[2]) for row in rows]
        steps += [row for place, row in enumerate(rows) if all(failing[place : place + 3]) and place + 2 < len(rows)]
    if not steps:
        return None
    module, phase, r_ratio, _ = max(steps, key=lambda row: row[2] or 0.0)
    return module, phase, float(r_ratio or 0.0)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): the shares that a two-sided test at that level does not reject."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959964, right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class Score:
    """A share with its interval."""

    name: str
    right: int
    total: int
    wanted: str

    @property
    def share(self) -> float:
        """As a number from 0 to 1."""
        return self.right / self.total if self.total else math.nan

    def line(self) -> str:
        """One line of the table."""
        low, high = wilson(self.right, self.total)
        share = "-" if not self.total else f"{self.share:.1%}"
        return f"{self.name:46}{share:>8}  [{low:.1%}, {high:.1%}]  {self.right}/{self.total}  {self.wanted}"


def scores(faults: Sequence[Outcome], clean: Sequence[CleanOutcome]) -> list[Score]:
    """The figures of a benchmark run. Origin and cause count detected bugs whose effect exceeds the noise."""
    visible = [one for one in faults if one.visible]
    found = [one for one in visible if one.detected]
    hidden = [one for one in faults if not one.visible]

    def share(name: str, right: Sequence[bool], wanted: str = "") -> Score:
        return Score(name, sum(right), len(right), wanted)

    return [
        share("detected, effect above the noise", [o.detected for o in visible], ">= 97 %"),
        share("detected by R alone", [o.compared == "fail" for o in visible]),
        share("origin first", [o.origin_rank == 1 for o in found], ">= 92 %"),
        share("origin among the first three", [1 <= o.origin_rank <= 3 for o in found], ">= 98 %"),
        share("cause first", [o.cause_right for o in found], ">= 80 %"),
        share("confident wrong cause", [o.confident_wrong for o in faults], "<= 3 %"),
        share("clean: verdict fail", [c.verdict == "fail" for c in clean], "<= 1 %"),
        share("clean: not pass (fail or undecided)", [c.verdict != "pass" for c in clean]),
        share("clean: some suspect", [c.n_suspects > 0 for c in clean]),
        share("clean: confident cause", [bool(c.named) for c in clean]),
        share("effect below the noise, yet verdict fail", [o.detected for o in hidden]),
        share("published rules: detected", [o.published_detected for o in visible]),
        share("published rules: origin first", [o.published_origin_right for o in visible if o.published_detected]),
        share(
            "published rules: class of the cause", [o.published_class_right for o in visible if o.published_detected]
        ),
        share("published rules: clean port flagged", [c.published_detected for c in clean]),
    ]
