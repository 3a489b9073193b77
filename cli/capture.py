"""Commands that make runs: the group capture, and capture hf."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..store import InputError, Trace
from .capture_options import (
    Batch,
    Exclude,
    Generate,
    Include,
    Io,
    Layers,
    Ports,
    Positions,
    PromptsFile,
    PromptTexts,
    Replicates,
    Role,
    Run,
    StatisticsOnly,
    Teacher,
    prompt_inputs,
    selection,
)
from .console import Json, TracePath, human_bytes, print_json, print_table, progress, say, warn

if TYPE_CHECKING:
    from ..capture.hf_run import CaptureSummary
    from ..capture.plan import Plan


class Padding(str, Enum):
    """Side of the padding in batches."""

    left = "left"
    right = "right"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    from .capture_nxdi import capture_nxdi

    group = typer.Typer(help="Run a model and record its tensors.", no_args_is_help=True)
    group.command("hf")(capture_hf)
    group.command("nxdi")(capture_nxdi)
    app.add_typer(group, name="capture")


def capture_hf(
    trace: TracePath,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or a config.json with --random-init.")],
    run: Run,
    role: Role,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    prompt: PromptTexts = None,
    prompts: PromptsFile = None,
    generate: Generate = 1,
    teacher: Teacher = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    positions: Positions = None,
    io: Io = Ports.output,
    statistics_only: StatisticsOnly = False,
    batch: Batch = 1,
    padding: Annotated[Padding, typer.Option(help="Side of the padding in batches.")] = Padding.left,
    random_init: Annotated[int | None, typer.Option(metavar="SEED", help="Random weights from this seed.")] = None,
    attention: Annotated[str | None, typer.Option(help="Attention implementation, for example eager or sdpa.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run modelling code that lies in the model folder.")] = False,
    by_layer: Annotated[
        bool | None,
        typer.Option(
            "--by-layer/--whole",
            help="Widen the weights of one layer at a time; by default where they would not fit in memory.",
        ),
    ] = None,
    replicate: Replicates = None,
    plan: Annotated[bool, typer.Option(help="Predict tensors, bytes and time; run nothing.")] = False,
    json: Json = False,
) -> None:
    """Run a Hugging Face causal language model and record every module's output."""
    from ..capture.generate import Generation
    from ..capture.hf import ModelSource, load_config, parse_dtype, quiet_transformers
    from ..capture.hf_run import HuggingFaceCapture, capture_hugging_face, prepare_prompts, try_plan
    from ..capture.replicate import parse_replicate

    parse_dtype(dtype)
    capture = HuggingFaceCapture(
        source=ModelSource(model, random_init, trust_remote_code, attention, by_layer),
        run=run,
        role=role,
        dtype=dtype,
        prompts=prompt_inputs(prompt, prompts, teacher=teacher, generate=generate),
        teacher=teacher,
        generation=Generation(new_tokens=generate, padding=padding.value, batch_size=batch),
        selection=selection(include, exclude, layers, positions, io),
        statistics_only=statistics_only,
        replicate=parse_replicate(replicate) if replicate else None,
    )
    quiet_transformers()
    config = load_config(capture.source)
    opened = Trace.create(trace)
    if plan:
        predicted, reason = try_plan(opened, capture, prepare_prompts(opened, capture, config))
        if predicted is None:
            raise InputError(f"{model} cannot be planned without running it: {reason}")
        print_plan(predicted, json)
        return
    with progress(f"capture {run}") as update:
        summary = capture_hugging_face(opened, capture, progress=update)
    print_summary(summary, json)


def print_plan(plan: Plan, json: bool) -> None:
    """Print what a capture would take."""
    if json:
        print_json(plan.as_dict())
        return
    rows = [
        ("tensors", str(plan.n_tensors)),
        ("values", human_bytes(plan.nbytes)),
        ("to disk at most", human_bytes(plan.stored_nbytes)),
        ("operations", f"{plan.flops / 1e9:.3g} GFLOP"),
        ("time", f"{plan.seconds:.3g} s (without loading the model)"),
    ]
    print_table("plan", ("what", "predicted"), rows)


def print_summary(summary: CaptureSummary, json: bool) -> None:
    """Print what a capture did, next to what had been planned."""
    plan = summary.plan
    if json:
        print_json({**summary.__dict__, "plan": plan.as_dict() if plan else None})
        return
    rows = [
        ("prompts", str(summary.n_prompts), ""),
        ("tensors", str(summary.n_tensors), str(plan.n_tensors) if plan else "-"),
        ("values", human_bytes(summary.nbytes), human_bytes(plan.nbytes) if plan else "-"),
        ("on disk", human_bytes(summary.stored_nbytes), f"<= {human_bytes(plan.stored_nbytes)}" if plan else "-"),
        ("time", f"{summary.seconds:.2f} s", f"{plan.seconds:.2f} s" if plan else "-"),
    ]
    print_table(f"run {summary.run}", ("what", "actual", "planned"), rows)
    if summary.observer["identical"]:
        say("logits with and without capture are bit-identical")
    else:
        warn(f"capturing changed the logits: largest difference {summary.observer['max_abs_difference']}")
    for site, reason in summary.skipped.items():
        warn(f"not stored: {site}: {reason}")
