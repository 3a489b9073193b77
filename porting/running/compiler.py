"""Compiling a port, with everything about it kept: what reached the compiler, what was made, why it failed."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...store.errors import InputError, SleuthError
from ..environment import find_environment
from .advice import advise
from .compiler_flags import apply_flags, environment, set_for_now
from .configuration import CompilationConfig, class_reference
from .reduction import reduce_checkpoint
from .restored import FILE, lost_on_the_way
from .sampling import Sampling
from .session import CpuPort, answer_on_cpu

REPORT, LOG = "compilation_report.json", "compilation.log"
MODEL = "model.pt"
#: Files of a work folder that say what the compiler was given and what it answered.
_KEPT = ("*.hlo*", "*.pb", "*.pbtxt", "*.neff", "*.json", "*.txt", "*log*", "*.ll")
_PROMPT = (1, 2, 3)


@dataclass
class CompilationReport:
    """What a compilation did.

    Attributes:
        success: whether all artifacts are there.
        on_cpu: built and run on a CPU, nothing was compiled.
        advice: remarks on sizes.
        notes: arguments that do not do what they say, and why.
        environment: variables that were set.
        compiler_args: arguments that each submodel passed to the compiler.
        artifacts: files that were made, with their sizes.
        missing: artifacts that should be there and are not.
        error: why it failed.
        known_problems: entries of the knowledge base that the log matches.
        failure_folder: what was kept of a failure.
        seconds: wall time.
    """

    success: bool = False
    on_cpu: bool = False
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    compiler_args: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    error: str = ""
    known_problems: list[dict[str, str]] = field(default_factory=list)
    failure_folder: str = ""
    seconds: float = 0.0


class DirectModelCompiler:
    """Compiles one port.

    Attributes:
        config: what is compiled.
        report: what the last `compile` did.
    """

    def __init__(self, config: CompilationConfig) -> None:
        """`config` says what is compiled; nothing happens yet."""
        self.config = config
        self.report = CompilationReport(on_cpu=config.on_cpu)
        self._output = Path(config.output_path)
        self._work = self._output / "compiler_workdir"

    def compile(self) -> bool:
        """Compile, verify what was made, and write `compilation_report.json`.

        Returns:
            Whether every artifact is there. On failure the report says why, and HLO artifacts are kept.

        Raises:
            InputError: the sources of NxD Inference are missing, or the port's files cannot be read.
        """
        self._output.mkdir(parents=True, exist_ok=True)
        self.report = CompilationReport(on_cpu=self.config.on_cpu)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sleuth-compile-") as scratch, _log_to(self._output / LOG) as log:
            try:
                model = self._model(Path(scratch))
                self.report.advice = advise(
                    json.loads((model / "config.json").read_text(encoding="utf-8")),
                    self.config.tp_degree,
                    self.config.ep_degree,
                )
                if self.config.on_cpu:
                    self._build_on_cpu(model)
                else:
                    self._compile(model)
            except Exception as error:  # noqa: BLE001 (whatever fails is reported, with all that helps to see why)
                log.write(traceback.format_exc())
                self.report.error = _reason(error, self.config.on_cpu)
        self.report.seconds = time.perf_counter() - started
        if not self.report.error:
            self._verify()
        self.report.success = not self.report.error and not self.report.missing
        if not self.report.success:
            self._keep_failure()
        text = json.dumps(asdict(self.report), indent=1)
        (self._output / REPORT).write_text(text + "\n", encoding="utf-8")
        return self.report.success

    def _model(self, scratch: Path) -> Path:
        model = Path(self.config.model_path)
        if self.config.reduce_layers is None:
            return model
        reduced = self._output / "reduced_model" if not self.config.on_cpu else scratch / "reduced_model"
        self.report.notes.append(
            f"layers are cut to the first {self.config.reduce_layers}: for trying out, not for use"
        )
        return reduce_checkpoint(model, self.config.reduce_layers, reduced)

    def _compile(self, model: Path) -> None:
        """On the device: the library's own compile, with flags where they reach the compiler."""
        from ...capture.nxdi.port import activate

        activate()
        configuration, experts = self._configuration(model)
        variables = environment(self.config, experts=experts, work_folder=self._work)
        self.report.environment = variables
        self.report.notes.append(
            "NEURON_CC_FLAGS is set, but the library passes each submodel's own arguments (compiler_args below)"
        )
        with set_for_now(variables):
            application: Any = self.config.model_class(model_path=str(model), config=configuration)
            self.report.compiler_args = apply_flags(application, self.config, experts=experts)
            application.compile(str(self._output))
        restored = self.config.config_class.load(str(self._output))  # type: ignore[attr-defined]
        self.report.notes += [f"not restored from {FILE}: {text}" for text in lost_on_the_way(self._output, restored)]

    def _configuration(self, model: Path) -> tuple[Any, bool]:
        """The inference configuration, and whether the port has experts."""
        from neuronx_distributed_inference.models.config import MoENeuronConfig
        from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

        config = self.config
        own = config.config_class.get_neuron_config_cls()  # type: ignore[attr-defined]
        neuron_class = config.neuron_config_class or own
        if neuron_class is not own:
            self.report.notes.append(
                f"{config.config_class.__name__} names {own.__name__}, not {neuron_class.__name__}: "
                f"a compiled folder is read back as {own.__name__}"
            )
        experts = issubclass(neuron_class, MoENeuronConfig)
        options = self._neuron_options(experts)
        if config.capture_globs:
            options.update(self._capture_options(model))
        return config.config_class(neuron_class(**options), load_config=load_pretrained_config(str(model))), experts

    def _neuron_options(self, experts: bool) -> dict[str, Any]:
        import torch

        config = self.config
        options: dict[str, Any] = {
            "tp_degree": config.tp_degree,
            "ep_degree": config.ep_degree,
            "world_size": config.tp_degree * config.ep_degree,
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "max_context_length": config.seq_len,
            "torch_dtype": getattr(torch, config.dtype),
            "save_sharded_checkpoint": True,
        }
        if experts:
            options["enable_cte_modular_flow"] = True
        if config.blockwise_matmul_config is not None:
            if experts:
                options["blockwise_matmul_config"] = dict(config.blockwise_matmul_config)
            else:
                self.report.notes.append(
                    "blockwise_matmul_config is for experts; this port's NeuronConfig has no such key"
                )
        return {**options, **config.neuron_options}

    def _capture_options(self, model: Path) -> dict[str, Any]:
        """Arguments that make the compiled graph return tensors: exact names, one tensor per module."""
        from ...capture.nxdi.device_plan import plan_device_capture
        from ...capture.selection import Selection
        from ..structure.meta import model_on_meta, one_rank, port_config

        shape = port_config(self.config.model_class, self.config.config_class, model, self.config.neuron_options)
        with one_rank():
            tree = model_on_meta(self.config.model_class, shape)
        modules = {path: type(module).__name__ for path, module in tree.named_modules()}
        selection = Selection(include=self.config.capture_globs, inputs=self.config.capture_inputs)
        plan = plan_device_capture(modules, selection)
        self.report.notes += plan.notes
        if len(plan.passes) > 1:
            left = sum(len(part.modules) for part in plan.passes[1:])
            self.report.notes.append(
                f"{left} modules are over one graph's budget; compile them into a folder of their own"
            )
        options = plan.passes[0].neuron_options()
        if self.config.max_intermediate_tensors is not None:
            options["tensor_capture_config"]["max_intermediate_tensors"] = self.config.max_intermediate_tensors
        return options

    def _build_on_cpu(self, model: Path) -> None:
        """On a CPU: every rank is built, every weight accounted for, and a prompt is answered."""
        if self.config.ep_degree > 1:
            raise InputError("ep_degree above 1 needs a device; on a CPU choose ep_degree=1")
        if self.config.capture_globs:
            self.report.notes.append(
                "nothing has to be compiled in to capture on a CPU: use 'sleuth capture nxdi --cpu'"
            )
        port = CpuPort(
            model,
            class_reference(self.config.model_class),
            class_reference(self.config.config_class),
            self.config.dtype,
            self.config.tp_degree,
            self.config.batch_size,
            self.config.seq_len,
            dict(self.config.neuron_options),
        )
        found = answer_on_cpu(port, [_PROMPT], Sampling(new_tokens=2))
        if found.answers[0].n_nonfinite:
            raise InputError(
                "the port's logits hold NaN or infinity; compare its tensors with sleuth capture and compare"
            )
        (self._output / FILE).write_text(found.config + "\n", encoding="utf-8")
        self.report.notes.append("built and run on a CPU: nothing was compiled, and no device was shown to work")

    def _verify(self) -> None:
        """List what was made, and what is missing."""
        wanted = [FILE]
        if not self.config.on_cpu:
            ranks = range(self.config.tp_degree * self.config.ep_degree)
            wanted += [MODEL, *(f"weights/tp{rank}_sharded_checkpoint.safetensors" for rank in ranks)]
        for name in wanted:
            path = self._output / name
            size = path.stat().st_size if path.is_file() else 0
            if size:
                self.report.artifacts[name] = size
            else:
                self.report.missing.append(name)
        if self.report.missing:
            self.report.error = f"the compilation ended without {', '.join(self.report.missing)}"

    def _keep_failure(self) -> None:
        """Keep HLO artifacts, configuration and log, and look the log up."""
        from ...references import match_log

        name = f"{self.config.model_class.__name__}_{time.strftime('%Y%m%d-%H%M%S')}"
        folder = self._output / "compilation_failures" / name
        kept = folder / "hlo_artifacts"
        kept.mkdir(parents=True, exist_ok=True)
        for pattern in _KEPT if self._work.is_dir() else ():
            for file in self._work.rglob(pattern):
                if file.is_file():
                    target = kept / file.relative_to(self._work)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, target)
        settings = {
            key: value if isinstance(value, (int, float, bool)) else str(value)
            for key, value in vars(self.config).items()
        }
        (folder / "compilation_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        log = self._output / LOG
        if log.is_file():
            shutil.copy2(log, folder / LOG)
            self.report.known_problems = [
                {"entry": match.entry.id, "seen": match.text, "title": match.entry.title} for match in match_log(log)
            ]
        self.report.failure_folder = str(folder)


def _reason(error: Exception, on_cpu: bool) -> str:
    if isinstance(error, SleuthError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if on_cpu or find_environment().has_sdk:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    reached = next((frame for frame in reversed(frames) if "neuronx_distributed" in frame.filename), frames[-1])
    return (
        "this machine has no Neuron SDK, which compiles; everything before it worked, up to "
        f"{Path(reached.filename).name}:{reached.lineno} ({text})"
    )


@contextmanager
def _log_to(path: Path) -> Iterator[Any]:
    """A log file that receives what the libraries log meanwhile."""
    with path.open("w", encoding="utf-8") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(levelname)s:%(name)s:%(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield stream
        finally:
            logging.getLogger().removeHandler(handler)
