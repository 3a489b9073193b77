"""Recording a compiled model on a Neuron device, through the library's tensor capture.

None of this has run on a device yet: what a CPU can show of it runs in the tests, through the same adapter and hook.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...porting.environment import Environment, find_environment, require_sources
from ...store.errors import InputError
from ...store.manifest import Module, Prompt, PromptTokens, RunManifest
from ...store.progress import Progress, no_progress
from ...store.run_writer import RunWriter
from ...store.trace import Trace
from ..drive import run_prompts
from ..hf import ModelSource, checkpoint_fingerprint, load_config, quiet_transformers, stop_tokens
from ..hf_run import CaptureSummary, HuggingFaceCapture, prepare_prompts, selection_facts
from ..layout import StepLayout, infer_dims
from ..provenance import environment
from .adapter import NxdiCausalModel
from .captured import CapturedTensorHook
from .device_plan import DevicePass
from .port import activate, load_class, parse_class
from .run import NxdiCapture

#: Last names of modules whose output every rank holds a part of.
_SHARDED = frozenset({"q_proj", "k_proj", "v_proj", "Wqkv", "gate_proj", "up_proj", "gate_up_proj", "act_fn"})


def capture_on_device(
    trace: Trace, capture: NxdiCapture, compiled: Path, *, progress: Progress = no_progress
) -> CaptureSummary:
    """Run a compiled port on the Neuron device of this machine and record what it captures.

    Args:
        trace: the trace that receives the run.
        capture: what to do; its selection can only narrow what was compiled in.
        compiled: folder that the port was compiled into, with tensor capture in its configuration.
        progress: called with a stage, steps done and steps in all.

    Raises:
        InputError: there is no Neuron SDK or device, or the model was compiled without tensor capture.
        SleuthError: values could not be written.
    """
    found = find_environment()
    require_sources(found)
    require_device(found, compiled)
    quiet_transformers()
    activate(found)
    source = ModelSource(capture.model)
    config = load_config(source)
    prompts = prepare_prompts(
        trace,
        HuggingFaceCapture(
            source, capture.run, capture.role, capture.dtype, capture.prompts, capture.teacher, capture.generation
        ),
        config,
    )
    generation = replace(capture.generation, stop_tokens=stop_tokens(config), padding="right")
    progress("load", 0, 1)
    application = load_class(parse_class(capture.port))(str(compiled))
    application.load(str(compiled))
    neuron = application.neuron_config
    compiled_in = compiled_pass(neuron)
    facts = environment()
    facts.update(
        checkpoint_fingerprint=checkpoint_fingerprint(source),
        teacher=capture.teacher,
        port=capture.port,
        compiled=str(compiled),
        captured_ranks=[0],
        modules_to_capture=list(compiled_in.modules),
        selection=selection_facts(capture.selection),
        observer_effect={"checked": False},
        note="captured by the compiled graph; with tensor parallelism only rank 0's part is returned",
    )
    manifest = trace.begin_run(
        RunManifest(
            ordinal=0,
            run=capture.run,
            role=capture.role,
            stack="nxdi",
            model=str(capture.model),
            dtype=str(neuron.torch_dtype).removeprefix("torch."),
            device="neuron",
            tp=int(neuron.tp_degree),
            status="running",
            created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
            provenance=facts,
            prompts=tuple(Prompt(index, p.id, p.text, len(p.token_ids)) for index, p in enumerate(prompts)),
        )
    )
    tokens: list[PromptTokens] = []
    started = time.perf_counter()

    def current(status: str = "running") -> RunManifest:
        return replace(
            manifest, status=status, provenance=dict(facts), tokens=tuple(tokens), modules=_modules(compiled_in)
        )

    writer = RunWriter(
        trace.run_folder(capture.run),
        capture.run,
        statistics_only=capture.statistics_only,
        manifest=lambda: current().to_json(),
    )
    hook = CapturedTensorHook(
        compiled_in.slots(), writer, dims_by_name(int(neuron.tp_degree)), positions=capture.selection.positions
    )
    drive = NxdiCausalModel(
        application,
        batch=int(neuron.batch_size),
        length=int(neuron.max_context_length),
        pad_token=generation.pad_token,
        one_by_one=bool(neuron.is_continuous_batching),
        recorders=(hook,),
        options={"tensor_capture_hook": hook},
    )
    status = "failed"
    try:
        with torch.no_grad():
            run_prompts(drive, prompts, generation, drive.step, tokens=tokens, progress=progress)
        status = "complete"
    finally:
        writer.close()
        facts["skipped"], facts["captured"] = dict(hook.skipped), dataclasses.asdict(writer.totals)
        trace.finish_run(current(status))
    return CaptureSummary(
        run=capture.run,
        n_prompts=len(prompts),
        **facts["captured"],
        seconds=time.perf_counter() - started,
        plan=None,
        observer=facts["observer_effect"],
        skipped=facts["skipped"],
    )


def compiled_pass(neuron_config: Any) -> DevicePass:
    """What a model was compiled to capture.

    Raises:
        InputError: nothing, or without the sampling that makes it return captures.
    """
    capture = getattr(neuron_config, "tensor_capture_config", None)
    modules = tuple(getattr(capture, "modules_to_capture", None) or ())
    if not modules:
        raise InputError("the model was compiled without tensor capture; compile it with the plan of this capture")
    if getattr(neuron_config, "on_device_sampling_config", None) is None:
        raise InputError("the model was compiled without on-device sampling and returns no captured tensors")
    return DevicePass(modules, bool(getattr(capture, "capture_inputs", False)))


def dims_by_name(tp: int) -> Any:
    """Dims of captured tensors where no module tree is at hand: by the last name of the module."""

    def dims(path: str, port: str, slot: str, tensor: torch.Tensor, layout: StepLayout) -> str:
        leaf = path.rpartition(".")[2]
        found = infer_dims(tensor.shape, layout.batch, layout.length, last_only=leaf == "lm_head")
        if found == "b s h" and leaf == "lm_head" and port == "output":
            return "b s v"
        sharded = tp > 1 and found == "b s h" and port == "output" and leaf in _SHARDED
        return f"{found}[tp]" if sharded else found

    return dims


def require_device(found: Environment, compiled: Path) -> None:
    """Insist on a Neuron device and a compiled folder.

    Raises:
        InputError: one is missing.
    """
    if not found.has_sdk or not found.devices:
        what = "the Neuron SDK" if not found.has_sdk else "a Neuron device"
        raise InputError(f"--compiled needs {what}, this machine has none; use --cpu, or run it on a Neuron instance")
    if not compiled.is_dir():
        raise InputError(f"{compiled} is no folder; name the folder that the port was compiled into")


def _modules(compiled_in: DevicePass) -> tuple[Module, ...]:
    return tuple(
        Module(path, "", path.rpartition(".")[0] or None, path.count(".") + 1, order, 0)
        for order, path in enumerate(compiled_in.modules)
    )
