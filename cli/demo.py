"""The command demo: the whole pipeline on the model that ships with tensorsleuth."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..store import InputError, Trace
from .compare import first_divergence, print_comparison
from .console import EXIT_CODES, Json, print_json, print_table, progress, say
from .diagnose import print_finding

_PLAN = """\
A byte-level Llama, trained on English prose, runs three times on the same prompts and tokens:
  fp32    transformers, FP32: the reference
  bf16    transformers, BF16: the baseline, which shows how much error the precision alone makes
  target  a second implementation with the module names of NxD Inference. It is a stand-in for a Neuron run,
          written in plain PyTorch: nothing here was compiled for, or ran on, an accelerator."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(demo)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where trace and plots go.")] = Path("sleuth-demo"),
    fault: Annotated[str | None, typer.Option(help="Plant this porting bug in the target.")] = None,
    list_faults: Annotated[bool, typer.Option("--list-faults", help="List the bugs that can be planted.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo in DIR.")] = False,
    json: Json = False,
) -> None:
    """Capture three runs of a small trained model, compare them, and name the first divergent site and its cause."""
    from ..examples.faults import FAULTS

    if list_faults:
        rows = [(name, bug.phase, bug.site, bug.description) for name, bug in FAULTS.items()]
        if json:
            print_json([dict(zip(("name", "phase", "site", "description"), row, strict=True)) for row in rows])
        else:
            print_table("", ("fault", "first shows in", "at", "what is wrong"), rows)
        return
    if fault is not None and fault not in FAULTS:
        raise InputError(f"there is no fault {fault!r}; 'sleuth demo --list-faults' lists them")
    _run(_fresh(folder, overwrite), folder, fault, json)


def _run(path: Path, folder: Path, fault: str | None, json: bool) -> None:
    from dataclasses import asdict

    from ..analyze.diagnosis import diagnose
    from ..analyze.plots import plot_layers, plot_qq
    from ..capture.hf import quiet_transformers
    from ..examples.walkthrough import capture_references, capture_target, compare_target

    if not json:
        say(_PLAN)
        say(f"planted bug: {fault}" if fault else "planted bug: none", "bold")
    quiet_transformers()
    trace = Trace.create(path)
    with progress("demo") as update:
        capture_references(trace, progress=update)
        capture_target(trace, fault=fault, progress=update)
        summary = compare_target(trace, progress=update)
        findings = diagnose(trace, summary.comparison, progress=update) if summary.verdict == "fail" else []
    first = first_divergence(trace, summary.comparison)
    pictures = [folder / "layers.png", folder / "qq.png"]
    plot_layers(trace, summary.comparison, pictures[0])
    site = (first["site"], first["phase"]) if first else None
    plot_qq(trace, summary.comparison, pictures[1], site=site)
    if json:
        causes = [asdict(finding) for finding in findings]
        print_json(
            {**summary.__dict__, "first_divergence": first, "findings": causes, "trace": path, "plots": pictures}
        )
    else:
        print_comparison(trace, summary, first)
        for finding in findings:
            print_finding(finding)
        say(f"trace: {path}   plots: {', '.join(map(str, pictures))}")
        say(f"ask it more: sleuth sql {path} 'FROM layer_profile'")
    raise typer.Exit(EXIT_CODES[summary.verdict])


def _fresh(folder: Path, overwrite: bool) -> Path:
    """The trace's path inside the demo's folder, emptied of an earlier demo."""
    path = folder / "trace"
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; add --overwrite to replace it, or name another folder")
    if path.exists():
        Trace.open(path)
        shutil.rmtree(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the demo")
    folder.mkdir(parents=True, exist_ok=True)
    return path
