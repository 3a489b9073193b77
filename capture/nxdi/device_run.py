"""Recording a compiled model on a Neuron device, through the library's tensor capture.

None of this has run on a device yet: what a CPU can show of it runs in the tests, through the same adapter and hook.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...porting.environment import Environment, find_environment, require_sources
from ...store.errors import InputError
from ...store.manifest import Module, Prompt, PromptTokens, RunManifest
from ...store.progress import Progress, no_progress
from ...store.run_writer import RunWriter
from ...store.trace import Trace
from ..hf import ModelSource, checkpoint_fingerprint, load_config, quiet_transformers, stop_tokens
from ..hf_run import CaptureSummary, HuggingFaceCapture, prepare_prompts, selection_facts
from ..layout import StepLayout, infer_dims
from ..prompts import EncodedPrompt
from ..provenance import environment
from .adapter import NxdiCausalModel
from .captured import CapturedTensorHook
from .device_plan import DevicePass
from .passes import Opened, record_passes
from .port import activate, load_class, parse_class
from .run import NxdiCapture

#: Last names of modules whose output every rank holds a part of.
_SHARDED = frozenset({"q_proj", "k_proj", "v_proj", "Wqkv", "gate_proj", "up_proj", "gate_up_proj", "act_fn"})


def capture_on_device(
    trace: Trace, capture: NxdiCapture, compiled: Sequence[Path], *, progress: Progress = no_progress
) -> CaptureSummary:
    """Run a compiled port on the Neuron device of this machine and record what it captures.

    Args:
        trace: the trace that receives the run.
        capture: what to do; its selection can only narrow what was compiled in.
        compiled: folders that the port was compiled into, with tensor capture in its configuration: one for every pass
            of a device plan. They are run one after the other, on the same tokens, into one run.
        progress: called with a stage, steps done and steps in all.

    Raises:
        InputError: there is no Neuron SDK or device, a model was compiled without tensor capture, or two of them
            differ in batch, length, dtype or ranks.
        SleuthError: values could not be written.
    """
    found = find_environment()
    require_sources(found)
    for folder in compiled:
        require_device(found, folder)
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
    loaded = CompiledPasses(load_class(parse_class(capture.port)), compiled, generation.pad_token)
    manifest = trace.begin_run(_manifest(capture, source, loaded.neuron, compiled, prompts))
    facts = dict(manifest.provenance)
    tokens: list[PromptTokens] = []
    started = time.perf_counter()

    def current(status: str = "running") -> RunManifest:
        return replace(
            manifest, status=status, provenance=dict(facts), tokens=tuple(tokens), modules=_modules(loaded.modules)
        )

    writer = RunWriter(
        trace.run_folder(capture.run),
        capture.run,
        statistics_only=capture.statistics_only,
        manifest=lambda: current().to_json(),
    )
    dims_of = dims_by_name(int(loaded.neuron.tp_degree))
    status = "failed"
    try:
        with torch.no_grad():
            facts |= record_passes(
                loaded, prompts, generation, writer, dims_of, tokens=tokens, positions=capture.selection.positions,
                progress=progress,
            )  # fmt: skip
        status = "complete"
    finally:
        writer.close()
        facts["captured"] = dataclasses.asdict(writer.totals)
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


def _manifest(
    capture: NxdiCapture, source: ModelSource, neuron: Any, compiled: Sequence[Path], prompts: Sequence[EncodedPrompt]
) -> RunManifest:
    facts = environment()
    facts.update(
        checkpoint_fingerprint=checkpoint_fingerprint(source),
        teacher=capture.teacher,
        port=capture.port,
        compiled=[str(folder) for folder in compiled],
        captured_ranks=[0],
        selection=selection_facts(capture.selection),
        observer_effect={"checked": False},
        skipped={},
        note="captured by the compiled graph; with tensor parallelism only rank 0's part is returned",
    )
    return RunManifest(
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


class CompiledPasses:
    """The compiled folders of one capture, loaded one at a time; iterate once.

    Attributes:
        neuron: NeuronConfig of the first.
        modules: what is captured, over all that were loaded so far.
    """

    def __init__(self, port: Any, folders: Sequence[Path], pad_token: int) -> None:
        """Load the first one.

        Args:
            port: class of the port's causal language model.
            folders: compiled folders.
            pad_token: token id at padding.

        Raises:
            InputError: it was compiled without tensor capture.
        """
        self._port, self._folders, self._pad_token = port, tuple(folders), pad_token
        self._loaded: Any = self._load(self._folders[0])
        self.neuron = self._loaded.neuron_config
        self.modules = list(compiled_pass(self.neuron).modules)

    def __iter__(self) -> Iterator[tuple[DevicePass, Opened]]:
        """What each captures, and how it is opened.

        Raises:
            InputError: one was compiled without tensor capture, or otherwise than the first.
        """
        for folder in self._folders:
            application, self._loaded = self._loaded or self._load(folder), None
            part = compiled_pass(application.neuron_config)
            _check_alike(self.neuron, application.neuron_config, folder)
            self.modules = list(dict.fromkeys([*self.modules, *part.modules]))
            yield part, partial(self._opened, application)
            del application  # before the next is loaded: a device holds one

    def _load(self, folder: Path) -> Any:
        application = self._port(str(folder))
        application.load(str(folder))
        return application

    @contextmanager
    def _opened(self, application: Any, hook: CapturedTensorHook) -> Iterator[NxdiCausalModel]:
        neuron = application.neuron_config
        yield NxdiCausalModel(
            application,
            batch=int(neuron.batch_size),
            length=int(neuron.max_context_length),
            pad_token=self._pad_token,
            one_by_one=bool(neuron.is_continuous_batching),
            recorders=(hook,),
            options={"tensor_capture_hook": hook},
        )


def _check_alike(first: Any, other: Any, folder: Path) -> None:
    """Passes of one run differ in what they capture, and in nothing else that shows."""
    for name in ("torch_dtype", "tp_degree", "batch_size", "max_context_length", "is_continuous_batching"):
        wanted, given = getattr(first, name, None), getattr(other, name, None)
        if wanted != given:
            raise InputError(
                f"{folder} was compiled with {name}={given}, the first pass with {wanted}; compile all passes of a "
                "capture alike, or record them as runs of their own"
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


def _modules(paths: Sequence[str]) -> tuple[Module, ...]:
    return tuple(
        Module(path, "", path.rpartition(".")[0] or None, path.count(".") + 1, order, 0)
        for order, path in enumerate(paths)
    )
