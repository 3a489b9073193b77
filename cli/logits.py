"""The command logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import Trace
from .console import EXIT_CODES, VERDICT_STYLES, Json, TracePath, print_json, print_table, progress, say

if TYPE_CHECKING:
    from ..analyze.logits import LogitReport
    from ..analyze.logits.criteria import Criterion

_PROFILE = ("prompt", "positions", "bad", "first bad", "R", "cosine min", "KL mean", "KL max", "at", "top-1", "top-5",
            "top-10", "flips", "expected", "first flip")  # fmt: skip
_FLIPS = ("prompt", "position", "phase", "reference", "target", "rank", "probability", "margin (ULP)", "odds", "sigma")
#: Prompts and flips that are listed, the worst first.
_LISTED = 20


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(logits)


def logits(
    trace: TracePath,
    comparison: Annotated[str, typer.Argument(metavar="C", help="Name of the comparison.")],
    site: Annotated[
        str | None, typer.Option(help="Site that holds the logits, of the reference or the target.")
    ] = None,
    greedy: Annotated[
        str | None, typer.Option(metavar="RUN", help="A free run of the target, whose tokens are compared too.")
    ] = None,
    json: Json = False,
) -> None:
    """Judge next-token distributions position by position: KL, agreement, flips against what rounding explains."""
    from ..analyze.logits import judge_logits
    from ..analyze.sql_library import run_sql

    opened = Trace.open(trace)
    with progress("logits") as update:
        report = judge_logits(opened, comparison, site=site, greedy=greedy, progress=update)
    statement = "SELECT * EXCLUDE (comparison) FROM logit_profile WHERE comparison = ? ORDER BY prompt"
    prompts = run_sql(opened, statement, [comparison]).to_pylist()
    statement = "FROM logit_flips WHERE comparison = ? ORDER BY flip_sigma DESC NULLS LAST, prompt, position"
    flips = run_sql(opened, statement, [comparison]).to_pylist()
    if json:
        print_json({**report.as_dict(), "prompts": prompts, "flips": flips})
    else:
        _print(report, prompts, flips)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _print(report: LogitReport, prompts: list[dict[str, Any]], flips: list[dict[str, Any]]) -> None:
    padded = f", {report.n_padded} padded columns left out" if report.n_padded else ""
    say(
        f"logits: {report.reference_site}, in the target {report.target_site}; {report.vocabulary} tokens{padded}; "
        f"margins in ULPs of {report.dtype}"
    )
    _print_positions(report)
    prompts = sorted(prompts, key=lambda row: (-row["n_fail"], -(row["kl_max"] or 0.0)))
    more = f" ({_LISTED} of {len(prompts)}, the worst)" if len(prompts) > _LISTED else ""
    print_table(f"{report.comparison}: by prompt{more}", _PROFILE, [_profile(row) for row in prompts[:_LISTED]])
    if flips:
        more = f" ({_LISTED} of {len(flips)}, the least expected)" if len(flips) > _LISTED else ""
        print_table(f"other first tokens{more}", _FLIPS, [_flip(row) for row in flips[:_LISTED]])
    _print_greedy(report)
    columns = ("criterion", "value", "limit", "baseline", "verdict", "note")
    rows = [_criterion(item) for item in report.criteria if item.scope == "all"]
    print_table("criteria over all positions (* published by the Equivalence skill)", columns, rows)
    _print_phases(report)
    say(f"the published criteria alone, to the letter: {report.published}")
    say(f"verdict: {report.verdict}", VERDICT_STYLES[report.verdict])
    for reason in report.reasons:
        say(f"  - {reason}")


def _print_phases(report: LogitReport) -> None:
    """The phases side by side, and which of them is to blame."""
    phases = list(dict.fromkeys(item.scope for item in report.criteria if item.scope != "all"))
    if not phases:
        return
    found = {(item.meaning, item.scope): item for item in report.criteria if item.scope != "all"}
    rows = [
        (meaning, *(cell for phase in phases for cell in _in_phase(found.get((meaning, phase)))))
        for meaning in dict.fromkeys(meaning for meaning, _ in found)
    ]
    print_table("by phase", ("criterion", *(cell for phase in phases for cell in (phase, "verdict"))), rows)
    wrong = [phase for phase in phases if any(i.scope == phase and i.verdict == "fail" for i in report.criteria)]
    if wrong and len(wrong) < len(phases):
        fine = ", ".join(phase for phase in phases if phase not in wrong)
        say(f"it is {', '.join(wrong)} that is wrong; {fine} keeps every limit", "bold red")


def _print_positions(report: LogitReport) -> None:
    total = {name: sum(getattr(item, name) for item in report.positions)
             for name in ("compared", "reference_only", "target_only", "apart")}  # fmt: skip
    say(f"{total['compared']} positions of {len(report.positions)} prompts have logits in all runs")
    if total["reference_only"]:
        say(f"{total['reference_only']} have none in the target or the baseline (a prefill may compute its last only)")
    if total["target_only"]:
        say(f"{total['target_only']} have none in the reference")
    if total["apart"]:
        say(f"{total['apart']} are left out: the runs had been fed different tokens by then")


def _print_greedy(report: LogitReport) -> None:
    if not report.greedy:
        return
    columns = ("prompt", "tokens", "the same", "first difference", "missing at the end", "beyond the end")
    rows = [(m.prompt, m.n_tokens, m.n_match, m.first_difference, m.n_missing, m.n_beyond) for m in report.greedy]
    print_table(f"free run {report.greedy_run}", columns, rows[:_LISTED])


def _profile(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("prompt", "n_positions", "n_fail", "first_fail", "r_ratio", "cosine_min", "kl_mean", "kl_max",
             "worst_position", "top1_rate", "top5_overlap", "top10_overlap", "n_flips", "flips_expected",
             "first_flip")  # fmt: skip
    return tuple(_text("cosine", row[n]) if n == "cosine_min" and row[n] is not None else row[n] for n in names)


def _flip(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("prompt", "position", "phase", "reference_token", "target_token", "rank_reference_token",
             "p_reference_token", "margin_ulp", "flip_expected", "flip_sigma")  # fmt: skip
    return tuple(row[name] for name in names)


def _criterion(item: Criterion) -> tuple[Any, ...]:
    limit = "-" if item.limit is None else f"{item.sense} {item.limit:.4g}"
    baseline = None if item.baseline is None else _text(item.name, item.baseline)
    return (f"{item.meaning}{' *' if item.published else ''}", _number(item), limit, baseline, item.verdict, item.note)


def _in_phase(item: Criterion | None) -> tuple[str | None, str | None]:
    """Value and verdict; with few positions a phase lacks some criteria."""
    return (None, None) if item is None else (_number(item), item.verdict)


def _number(item: Criterion) -> str | None:
    return None if item.value is None else _text(item.name, item.value)


def _text(name: str, value: float) -> str:
    """A number; cosines, all of them close to 1, with their digits."""
    return f"{value:.7g}" if name.startswith("cosine") else f"{value:.4g}"
