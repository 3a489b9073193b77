"""The command capture nxdi."""

from __future__ import annotations

import json as json_lib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..store import InputError, Trace
from .capture import print_plan, print_summary
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
    Role,
    Run,
    StatisticsOnly,
    Teacher,
    prompt_inputs,
    selection,
)
from .console import Json, TracePath, progress


def capture_nxdi(
    trace: TracePath,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder: config.json and weights.")],
    run: Run,
    port: Annotated[
        str, typer.Option(metavar="FILE:CLASS", help="The port's causal language model; MODULE:CLASS too.")
    ],
    role: Role = "target",
    config: Annotated[
        str, typer.Option(metavar="FILE:CLASS", help="Its inference configuration; the port's own by default.")
    ] = "",
    cpu: Annotated[bool, typer.Option("--cpu", help="Run the NxD Inference sources on this CPU.")] = False,
    compiled: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Run a model compiled with tensor capture on a Neuron device; once per pass."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree: one process per rank.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    prompt: PromptTexts = None,
    prompts: PromptsFile = None,
    generate: Generate = 1,
    teacher: Teacher = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    positions: Positions = None,
    io: Io = Ports.output,
    scores: Annotated[
        bool,
        typer.Option(help="Record attention scores (prefill) and weights; both grow with the square of the length."),
    ] = False,
    library_capture: Annotated[
        bool, typer.Option("--library-capture", help="On a CPU, record through NxD Inference's own tensor capture.")
    ] = False,
    statistics_only: StatisticsOnly = False,
    batch: Batch = 1,
    length: Annotated[
        int | None, typer.Option(min=2, help="Prefill bucket and cache length; a multiple of 64 that fits by default.")
    ] = None,
    neuron: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Argument of the NeuronConfig, for example fused_qkv=true."),
    ] = None,
    plan: Annotated[bool, typer.Option(help="Predict tensors, bytes and time on a CPU; run nothing.")] = False,
    json: Json = False,
) -> None:
    """Run an NxD Inference port and record every rank: on a CPU, or compiled on a Neuron device."""
    if cpu == bool(compiled):
        raise InputError("say where the port runs: --cpu, or --compiled DIR on a Neuron device")
    options = dict(neuron_option(text) for text in neuron or ())

    from ..porting.environment import find_environment, require_sources

    require_sources(find_environment())

    from ..capture.generate import Generation
    from ..capture.nxdi.run import NxdiCapture, capture_on_cpu

    request = NxdiCapture(
        model=model,
        port=port,
        run=run,
        role=role,
        config=config,
        dtype=dtype,
        tp=tp,
        prompts=prompt_inputs(prompt, prompts, teacher=teacher, generate=generate),
        teacher=teacher,
        generation=Generation(new_tokens=generate, padding="right", batch_size=batch),
        selection=selection(include, exclude, layers, positions, io),
        statistics_only=statistics_only,
        scores=scores,
        library_capture=library_capture,
        length=length,
        options=options,
    )
    opened = Trace.create(trace)
    if plan:
        from ..capture.nxdi.planning import plan_on_cpu

        if compiled:
            raise InputError("--plan predicts captures on a CPU; give --cpu")
        print_plan(plan_on_cpu(opened, request), json)
        return
    with progress(f"capture {run}") as update:
        if not compiled:
            summary = capture_on_cpu(opened, request, progress=update)
        else:
            from ..capture.nxdi.device_run import capture_on_device

            summary = capture_on_device(opened, request, compiled, progress=update)
    print_summary(summary, json)


def neuron_option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise InputError(f"--neuron {text!r} cannot be read; write NAME=VALUE, for example fused_qkv=true")
    try:
        return name, json_lib.loads(value)
    except ValueError:
        return name, value
