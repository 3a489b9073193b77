"""The command localize."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import Trace
from .console import EXIT_CODES, VERDICT_STYLES, Json, TracePath, print_json, print_table, progress, say

if TYPE_CHECKING:
    from ..analyze.localization.changes import SiteChange
    from ..analyze.localization.localize import Localization
    from ..analyze.localization.suspects import Suspect

_SUSPECTS = ("rank", "site", "in the target", "phase", "kind", "R", "95 % interval", "q", "injected", "reason")
_CHANGES = ("phase", "kind", "at", "between", "and", "R before", "R after")
_SENTENCES = {
    "fail": "most likely origin: {site} ({phase}), in the target {target_site}",
    "pass": "no suspects: every compared site is as good as the baseline",
    "undecided": "no suspects, but the comparison is undecided: what was not compared or judged may hide an origin",
}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(localize)


def localize(
    trace: TracePath,
    comparison: Annotated[str, typer.Argument(metavar="C", help="Name of the comparison.")],
    json: Json = False,
) -> None:
    """Say where the error comes from: origins apart from what inherits their error, and where R changes."""
    from ..analyze.localization.localize import localize as localize_comparison

    opened = Trace.open(trace)
    with progress("localize") as update:
        found = localize_comparison(opened, comparison, progress=update)
    if json:
        print_json(asdict(found))
    else:
        _print(opened, found)
    raise typer.Exit(EXIT_CODES[found.verdict])


def _print(trace: Trace, found: Localization) -> None:
    if found.suspects:
        print_table(f"{found.comparison}: suspects", _SUSPECTS, [_suspect_row(one) for one in found.suspects])
    if found.changes:
        print_table(f"{found.comparison}: where R changes", _CHANGES, [_change_row(one) for one in found.changes])
    first = asdict(found.suspects[0]) if found.suspects else {}
    say(_SENTENCES[found.verdict].format(**first), VERDICT_STYLES[found.verdict])
    if found.open:
        one = found.open[0]
        say(f"  {len(found.open)} sites may inject error of the size of noise, first {one.site} ({one.phase}):")
        say(f"  held against known causes: sleuth diagnose {trace.path} {found.comparison}")
    if found.verdict == "undecided":
        say(f"  why: sleuth sql {trace.path} 'FROM comparison_summary'")
    elif found.suspects:
        say(f"  its cause: sleuth diagnose {trace.path} {found.comparison}")


def _suspect_row(one: Suspect) -> tuple[Any, ...]:
    interval = None if one.r_low is None or one.r_high is None else f"{one.r_low:.4g} .. {one.r_high:.4g}"
    place = (one.rank, one.site, one.target_site, one.phase, one.kind)
    return (*place, one.r_ratio, interval, one.q_value, one.injected, one.reason)


def _change_row(one: SiteChange) -> tuple[Any, ...]:
    from math import exp

    levels = (exp(one.log_r_before), exp(one.log_r_before + one.log_r_change))
    return (one.phase, one.kind, one.site, one.site_low, one.site_high, *levels)
