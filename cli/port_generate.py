"""Commands of the group port that make ports: analyze, generate, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import EXIT_CODES, VERDICT_STYLES, Json, print_json, print_table, progress, say

if TYPE_CHECKING:
    from ..porting.parity.gate import Check, GateReport
    from ..porting.spec.encoder_decoder_facts import AnyArchitecture

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or a config.json alone.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group port."""
    group.command()(analyze)
    group.command()(generate)
    group.command()(check)


def analyze(
    model: Model,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the document instead.")] = False,
    json: Json = False,
) -> None:
    """Say what a model's architecture is, and where every fact comes from."""
    from ..capture.hf import quiet_transformers
    from ..porting.spec.document import json_schema, to_json
    from ..porting.spec.extract import analyse_model

    if schema:
        print_json(json_schema())
        return
    quiet_transformers()
    architecture = analyse_model(model)
    if json:
        print(to_json(architecture), end="")
        return
    print_table(
        f"{architecture.class_name}: {architecture.summary}",
        ("fact", "value", "from"),
        list(_facts(architecture)),
    )


def generate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that receives neuron_port/.")],
    sdk: Annotated[str | None, typer.Option(help="Neuron SDK 2.27, 2.28 or 2.29; else, one port for all.")] = None,
    json: Json = False,
) -> None:
    """Write the port of a model to NxD Inference; it is not checked, `port check` does that."""
    from ..capture.hf import quiet_transformers
    from ..porting.generator.generate import generate as generate_port
    from ..porting.generator.generate import write_port
    from ..porting.spec.extract import analyse_model

    quiet_transformers()
    port = generate_port(analyse_model(model), sdk)
    file = write_port(port, output)
    if json:
        print_json({"port": f"{file}:{port.class_name}", "files": sorted(port.files)})
        return
    say(f"{file}:{port.class_name}")
    say(f"check it: sleuth port check {model}")


def check(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Empty folder for port, checkpoint and trace; else a temporary one."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Largest number of ranks to run on.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="FP32 on one rank only.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and prompts.")] = 0,
    json: Json = False,
) -> None:
    """Generate a model's port and hold it against the model, site by site: FP32 and BF16, prefill and decode."""
    import tempfile

    from ..capture.hf import quiet_transformers
    from ..porting.environment import find_environment, require_sources
    from ..porting.parity.gate import FULL, QUICK, Setting, check_model
    from ..store.errors import InputError

    quiet_transformers()
    require_sources(find_environment())
    if output is not None and (output / "trace").exists():
        raise InputError(f"{output} holds a trace already; name a new folder")
    ranks = sorted({1, tp})
    settings = QUICK if quick else tuple(Setting(s.dtype, rank) for rank in ranks for s in FULL if s.tp == 1)
    with tempfile.TemporaryDirectory(prefix="sleuth-port-") as scratch, progress("check") as update:
        report = check_model(model, output or Path(scratch), settings, seed=seed, progress=update)
        if json:
            print_json(_as_dict(report))
        else:
            print_report(report, kept=output is not None)
    raise typer.Exit(EXIT_CODES[report.verdict])


def print_report(report: GateReport, *, kept: bool) -> None:
    """Print the checks, the first divergent module and the verdict."""
    columns = ("setting", "logits: relative L2", "logits: R", "worst site", "error or R", "sites", "seconds", "verdict")
    print_table(f"{report.architecture.class_name}: {report.port.reference}", columns, list(map(_row, report.checks)))
    for one in report.checks:
        if one.first_divergent:
            say(f"{one.setting.run}: first divergent module {one.first_divergent}", "bold red")
        for reason in one.reasons:
            say(f"  - {one.setting.run}: {reason}")
    say(f"verdict: {report.verdict}", VERDICT_STYLES[report.verdict])
    if kept:
        say(f"look into it: sleuth sql {report.trace} 'FROM divergence'")


def _row(one: Check) -> tuple[Any, ...]:
    numbers = (one.logits_error, one.logits_ratio, one.worst_site, one.worst, one.n_sites, round(one.seconds, 1))
    return (one.setting.run, *numbers, one.verdict)


def _as_dict(report: GateReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "architecture": report.architecture.class_name,
        "port": str(report.port_file),
        "verdict": report.verdict,
        "seconds_to_generate": report.seconds_to_generate,
        "checks": [{**asdict(one), "setting": one.setting.run} for one in report.checks],
    }


def _facts(architecture: AnyArchitecture) -> list[tuple[str, str, str]]:
    from ..porting.spec.document import leaves, origin_of

    return [(field, str(value), origin_of(architecture, field)) for field, value in leaves(architecture)]
