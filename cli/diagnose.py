"""The command diagnose."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import Trace
from .console import EXIT_CODES, Json, TracePath, print_json, progress, say

if TYPE_CHECKING:
    from ..analyze.diagnosis import Finding


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(diagnose)


def diagnose(
    trace: TracePath,
    comparison: Annotated[str, typer.Argument(metavar="C", help="Name of the comparison.")],
    json: Json = False,
) -> None:
    """Say why a target diverges: test every suspect site against named causes, from the trace alone."""
    from ..analyze.diagnosis import diagnose as find_causes
    from ..analyze.localization.suspects import open_suspects

    opened = Trace.open(trace)
    with progress("diagnose") as update:
        findings = find_causes(opened, comparison, progress=update)
    verdict = _verdict(opened, comparison, findings)
    if json:
        print_json({"comparison": comparison, "verdict": verdict, "findings": [asdict(item) for item in findings]})
    else:
        for finding in findings:
            print_finding(finding)
        if not findings:
            say(f"{comparison}: no suspect site; {_NOTHING[verdict]}", "green" if verdict == "pass" else "yellow")
            in_noise = len(open_suspects(opened, comparison))
            if in_noise:
                say(f"  R of {in_noise} sites may be noise; no known cause explains what they are off by")
    raise typer.Exit(EXIT_CODES[verdict])


_NOTHING = {
    "pass": "every compared site is as good as the baseline",
    "fail": "yet the comparison fails",
    "undecided": "but the comparison is undecided, see 'sleuth compare'",
}


def _verdict(trace: Trace, comparison: str, findings: list[Finding]) -> str:
    if any(finding.is_fault for finding in findings):
        return "fail"
    rows = trace.query("SELECT verdict FROM comparisons WHERE comparison = ?", [comparison]).to_pylist()
    return str(rows[0]["verdict"])


def print_finding(finding: Finding) -> None:
    """Print a finding: what, where, the evidence, what to do and where to look."""
    evidence = finding.evidence
    where = f"{finding.site} ({finding.phase}), in the target {finding.target_site}"
    sure = f", confidence {finding.confidence:.2f}" if finding.is_named else ""
    say(f"{finding.rank}. {finding.cause.replace('_', ' ')}{sure}", "bold red" if finding.is_fault else "bold")
    say(f"   where     {where}")
    say(f"   what      {finding.summary}")
    for text in (*_numbers(evidence), *_place(evidence)):
        say(f"   evidence  {text}")
    say(f"   to do     {finding.remedy}")
    if finding.entry:
        say(f"   read      sleuth kb show {finding.entry}")
    say(f"   look      {finding.command}")


def _numbers(evidence: dict[str, Any]) -> list[str]:
    lines = []
    if evidence.get("in_noise"):
        lines.append(f"R = {evidence['r_ratio']:.3g} alone could be noise, which one law or number would not explain")
    if "explained" in evidence:
        guess = f"{evidence['best_guess']} " if "best_guess" in evidence else ""
        lines.append(
            f"{guess}explains {_percent(evidence['explained'])} of the squared error and leaves"
            f" {evidence['residual_ratio']:.3g} times the noise to expect"
        )
    runner_up = evidence.get("runner_up")
    if runner_up:
        explained = max(runner_up["explained"], 0.0)
        lines.append(f"next best: {runner_up['cause']}, which explains {_percent(explained)}")
    return lines


def _percent(share: float) -> str:
    """A share as text that does not round up to 100 %."""
    missing = 1.0 - share
    return f"{share:.1%}" if missing > 5e-4 or missing <= 0 else f"all but {missing:.2g}"


def _place(evidence: dict[str, Any]) -> list[str]:
    where = evidence.get("where", {})
    lines = []
    if where:
        parts = [f"{where['tokens']:.0%} of the tokens", f"{where['features']:.0%} of the features"]
        if "which_heads" in where:
            parts.append(f"heads {', '.join(map(str, where['which_heads']))}")
        if where.get("first_position"):
            parts.append(f"from position {where['first_position']} on")
        lines.append(f"affected: {', '.join(parts)}")
    if evidence.get("weights", "not recorded") != "not recorded":
        lines.append(f"the recorded weight of this module: {evidence['weights']}")
    return lines
