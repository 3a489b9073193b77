"""Commands of the group port that run ports: compile, infer, validate."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..store import InputError
from .capture_nxdi import neuron_option
from .console import EXIT_CODES, VERDICT_STYLES, Json, print_json, print_table, progress, say, warn

if TYPE_CHECKING:
    from ..porting.running.validation import CaseReport

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the Hugging Face checkpoint.")]
Port = Annotated[str, typer.Option(metavar="FILE:CLASS", help="The port's causal model class; MODULE:CLASS too.")]
Config = Annotated[str, typer.Option(metavar="FILE:CLASS", help="Its configuration class; the port's own by default.")]
Neuron = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the port's NeuronConfig.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Run the NxD Inference sources on this CPU.")]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel degree.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Only the first layers: for trying out.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group port."""
    group.command("compile")(compile_port)
    group.command("infer")(infer)
    group.command("validate")(validate)


def compile_port(
    model: Model,
    port: Port,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the compiled port.")],
    config: Config = "",
    tp: Tp = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel degree.")] = 1,
    batch: Batch = 1,
    seq_len: Annotated[int, typer.Option(min=2, help="Longest sequence.")] = 128,
    fp32: Annotated[bool, typer.Option("--fp32", help="float32 instead of bfloat16.")] = False,
    layers: Layers = None,
    cpu: Cpu = False,
    capture: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Modules whose tensors the graph returns; 'all' for all.")
    ] = None,
    capture_inputs: Annotated[bool, typer.Option(help="Their inputs too.")] = True,
    compiler_args: Annotated[str, typer.Option(help="Further arguments of the compiler.")] = "",
    verify_hlo: Annotated[bool, typer.Option(help="Let the compiler verify its graphs.")] = False,
    neuron: Neuron = None,
    json: Json = False,
) -> None:
    """Compile a port, or with --cpu build and run it: exit 1 when it fails, with what helps to see why."""
    from ..porting.running.compiler import DirectModelCompiler
    from ..porting.running.configuration import CompilationConfig

    model_class, config_class = _classes(port, config)
    options = dict(neuron_option(text) for text in neuron or ())
    chosen: str | list[str] | None = "all" if capture and "all" in capture else capture
    compiler = DirectModelCompiler(
        CompilationConfig(
            model_class,
            config_class,
            None,
            model,
            out,
            batch,
            seq_len,
            tp,
            ep,
            not fp32,
            layers,
            cpu,
            chosen,
            capture_inputs,
            neuron_options=options,
            compiler_args=compiler_args,
            verify_hlo=verify_hlo,
        )
    )
    with progress("compile") as update:
        update("compile", 0, 1)
        success = compiler.compile()
    report = compiler.report
    if json:
        print_json(asdict(report))
    else:
        for text in (*report.advice, *report.notes):
            warn(text)
        for tag, words in report.compiler_args.items():
            say(f"{tag}: {words}")
        if report.artifacts:
            print_table("", ("artifact", "bytes"), list(report.artifacts.items()))
        for problem in report.known_problems:
            say(f"known problem: {problem['title']} ('sleuth kb show {problem['entry']}'): {problem['seen']}", "yellow")
        if not success:
            say(f"failed: {report.error}", "bold red")
            say(f"kept in {report.failure_folder}")
        else:
            say(f"done in {report.seconds:.1f} s: {out}")
    raise typer.Exit(0 if success else 1)


def infer(
    model: Model,
    port: Port,
    prompt: Annotated[str, typer.Option(help="The prompt; numbers such as 1,2,3 where there is no tokenizer.")],
    config: Config = "",
    compiled: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the port was compiled into.")
    ] = None,
    cpu: Cpu = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 50,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    special: Annotated[bool, typer.Option("--special", help="Let the port choose special tokens.")] = False,
    tp: Tp = 1,
    batch: Batch = 1,
    seq_len: Annotated[int, typer.Option(min=2, help="Longest sequence, on a CPU.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, on a CPU.")] = "bfloat16",
    layers: Layers = None,
    capture_dir: Annotated[Path | None, typer.Option(help="Save the tensors that were compiled in here.")] = None,
    json: Json = False,
) -> None:
    """Let a port answer a prompt: exit 1 when the answer is empty, repeated, or from NaN."""
    from ..porting.running.inference import run_inference_with_classes

    model_class, config_class = _classes(port, config)
    numbers = prompt.replace(" ", "").split(",")
    given: str | list[int] = [int(text) for text in numbers] if all(text.isdigit() for text in numbers) else prompt
    with progress("infer") as update:
        update("run", 0, 1)
        success, text, metrics = run_inference_with_classes(
            model_class, config_class, model, compiled, given, tokens, temperature, top_p, cpu, layers, seq_len, batch,
            not special, capture_dir is not None, tensor_capture_output_dir=capture_dir,
            tp_degree=tp, dtype=dtype, seed=seed,
        )  # fmt: skip
    if json:
        print_json({"success": success, "response": text, **metrics})
    else:
        say(text)
        say(
            f"{metrics['generated_tokens']} tokens in {metrics['inference_time']:.2f} s, first after "
            f"{1e3 * metrics['ttft_seconds']:.0f} ms, {metrics['tokens_per_second']:.1f} tokens/s"
        )
        if metrics["suppressed"]:
            warn(f"{metrics['suppressed']} special tokens were the likeliest and suppressed; --special shows them")
        if not success:
            say(f"no coherent answer: {metrics['incoherence']}", "bold red")
    raise typer.Exit(0 if success else 1)


def validate(
    config: Annotated[Path, typer.Option(help="Validation configuration: JSON.")],
    mode: Annotated[str, typer.Option(help="token, logit or comprehensive.")] = "token",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Instead of the file's cases.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Instead of the file's cases.")] = None,
    num_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per prompt; the file's by default.")] = None,
    hf_dtype: Annotated[str, typer.Option(help="Dtype of the golden reference.")] = "float32",
    skip_hf_comparison: Annotated[bool, typer.Option("--skip-hf-comparison", help="Do not compare.")] = False,
    accuracy_only: Annotated[bool, typer.Option("--accuracy-only", help="Only compare.")] = False,
    performance_only: Annotated[bool, typer.Option("--performance-only", help="Only measure.")] = False,
    skip_smoke_test: Annotated[bool, typer.Option("--skip-smoke-test", help="Do not try the port first.")] = False,
    continue_on_failure: Annotated[bool, typer.Option("--continue-on-failure", help="Go on after a failure.")] = False,
    results_dir: Annotated[Path, typer.Option(help="Folder for result files and traces.")] = Path("validation_results"),
    cpu: Cpu = False,
    json: Json = False,
) -> None:
    """Validate a port against its Hugging Face model: exit 0 pass, 1 fail, 3 undecided."""
    from ..porting.running.validation import Plan
    from ..porting.running.validation import validate as run
    from ..porting.running.validation_config import read_validation_config

    if accuracy_only and (performance_only or skip_hf_comparison):
        raise InputError("--accuracy-only contradicts --performance-only and --skip-hf-comparison")
    wanted = read_validation_config(config)
    if batch_size is not None or seq_len is not None:
        wanted = replace(wanted, test_parameters=((batch_size or 1, seq_len or 0),))
    if num_tokens is not None:
        wanted = replace(wanted, num_tokens_to_check=num_tokens)
    judged = wanted.expected_ttft_ms is not None or wanted.expected_tokens_per_second is not None
    plan = Plan(
        mode,
        hf_dtype,
        cpu,
        smoke=not (skip_smoke_test or accuracy_only or performance_only),
        accuracy=not (skip_hf_comparison or performance_only),
        performance=performance_only or (judged and not accuracy_only),
        go_on=continue_on_failure,
    )
    with progress("validate") as update:
        reports = run(wanted, plan, results_dir, progress=update)
    if json:
        print_json([{**asdict(report), "verdict": report.verdict} for report in reports])
    else:
        _show(reports)
    verdicts = {report.verdict for report in reports}
    verdict = next(name for name in ("fail", "undecided", "pass") if name in verdicts)
    raise typer.Exit(EXIT_CODES[verdict])


def _show(reports: list[CaseReport]) -> None:
    for report in reports:
        title = f"batch {report.batch_size}, sequence length {report.seq_len}"
        rows = [(stage.name, stage.verdict, stage.summary, stage.seconds) for stage in report.stages]
        print_table(title, ("stage", "verdict", "what was found", "seconds"), rows)
        for note in report.notes:
            say(f"  - {note}")
        if report.trace:
            say(f"trace: {report.trace}")
        say(f"verdict: {report.verdict}", VERDICT_STYLES[report.verdict])


def _classes(port: str, config: str) -> tuple[Any, Any]:
    from ..porting.structure.meta import port_classes

    return port_classes(port, config)
