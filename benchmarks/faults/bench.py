"""One architecture of the benchmark: its runs, and what the analysis says about a target.

The reference and the baseline are captured once per architecture. A target runs a patched model through the same
capture as any user's port, into a copy of that trace; `compare`, `suspects` and `diagnose` see nothing but the trace.
Matrices are not kept with the runs: those of a real model are above the limit for stored parameters, gains, biases,
sinks and routers are below it. The limit is lowered in proportion to these small models.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.capture import recorder
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import HuggingFaceCausalModel, ModelSource, checkpoint_fingerprint, quiet_transformers
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face, run_recorded
from tensorsleuth.capture.prompts import EncodedPrompt, PromptInput, teacher_prompts
from tensorsleuth.capture.replicate import Replicate
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import Trace

from .architectures import PAD, STEPS, Checkpoint, checkpoint, prompts
from .effect import Observation, Truth, effects, observe
from .effect import truth as truth_of
from .fault import Fault, Severity
from .port import make_port

REFERENCE, BASELINE, TARGET = "fp32", "bf16", "target"
BATCH = 6
#: 1 MB for a hidden size of 4096 is 512 numbers in FP32 for each of its 1/2 feature: gains and routers stay below.
STORED_PARAMETER_BYTES = 4096


#: Runs a model over prompts as the target of a trace; the facts hold the selection as `chosen`.
Driver = Callable[[Trace, Any, Sequence[EncodedPrompt], dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What the targets of one benchmark run have in common.

    Attributes:
        cache: folder of trained checkpoints.
        scratch: folder of traces.
        inputs: record inputs of modules too.
        n_prompts: prompts.
        n_decode: decode steps.
        steps: optimiser steps of the checkpoints' training.
        replicates: kinds of baseline replicates that verdicts rest on, see `capture.replicate`.
    """

    cache: Path
    scratch: Path
    inputs: bool = True
    n_prompts: int = 12
    n_decode: int = 4
    steps: int = STEPS
    replicates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suspected:
    """One line of a ranking: a suspect or a finding."""

    module: str
    site: str
    phase: str
    kind: str
    r_ratio: float | None
    cause: str = ""
    confidence: float = 0.0


@dataclass(frozen=True)
class Report:
    """What the analysis said about one target.

    Attributes:
        verdict: of the whole chain: `fail` if the comparison fails or a cause is named.
        compared: of the comparison alone.
        suspects: ranked; before them sites that a cause convicts and R alone does not.
        findings: ranked; empty when diagnosis failed.
        measured: `(module, phase, R, verdict)` of every measurement over all prompts, in dataflow order.
        errors: stages that raised, with the message.
        seconds: wall time by stage.
        folder: the trace.
    """

    verdict: str
    compared: str
    suspects: tuple[Suspected, ...]
    findings: tuple[Suspected, ...]
    measured: tuple[tuple[str, str, float | None, str], ...]
    errors: dict[str, str]
    seconds: dict[str, float]
    folder: str


@dataclass
class Bench:
    """One architecture, ready for targets."""

    name: str
    settings: Settings

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its trained weights."""
        return checkpoint(self.name, self.settings.cache, self.settings.steps)

    @property
    def generation(self) -> Generation:
        """How prompts are batched."""
        return Generation(batch_size=BATCH, pad_token=PAD)

    @property
    def selection(self) -> Selection:
        """What is recorded."""
        return Selection(inputs=self.settings.inputs)

    @cached_property
    def trace(self) -> Trace:
        """The trace with reference and baseline; captured when it is not there yet."""
        quiet_transformers()
        recorder.SMALL_PARAMETER_BYTES = STORED_PARAMETER_BYTES
        kind = "both" if self.settings.inputs else "outputs"
        numbers = f"{self.settings.steps}-{self.settings.n_prompts}-{self.settings.n_decode}"
        path = self.settings.scratch / "-".join((self.name, kind, numbers, *self.settings.replicates))
        if not (path / "done").exists():
            shutil.rmtree(path, ignore_errors=True)
            self._capture_references(Trace.create(path / "trace"))
            (path / "done").touch()
        return Trace.open(path / "trace")

    def _capture_references(self, trace: Trace) -> None:
        source = ModelSource(self.checkpoint.folder, attention="eager")
        texts = [PromptInput(str(n), token_ids=ids) for n, ids in enumerate(prompts(self.settings.n_prompts))]
        generation = Generation(self.settings.n_decode + 1, batch_size=BATCH, pad_token=PAD)
        first = HuggingFaceCapture(
            source, REFERENCE, "reference", prompts=texts, generation=generation, selection=self.selection
        )
        capture_hugging_face(trace, first)
        for kind in ("", *self.settings.replicates):
            follower = HuggingFaceCapture(
                source,
                kind or BASELINE,
                "baseline",
                "bfloat16",
                teacher=REFERENCE,
                generation=self.generation,
                selection=self.selection,
                replicate=Replicate(kind) if kind else None,
            )
            capture_hugging_face(trace, follower)

    @cached_property
    def encoded(self) -> list[EncodedPrompt]:
        """The prompts with the tokens that the reference went on with."""
        return teacher_prompts(self.trace.manifest(REFERENCE))

    def port(self, dtype: torch.dtype) -> Any:
        """A correct port."""
        return make_port(self.checkpoint.model(dtype))

    # What is true

    @cached_property
    def _reference(self) -> Observation:
        return observe(self.checkpoint.model(torch.float32), self.encoded, self.generation)

    @cached_property
    def _baseline(self) -> Observation:
        return observe(self.checkpoint.model(torch.bfloat16), self.encoded, self.generation)

    def truth(self, fault: Fault, severity: Severity, modules: frozenset[str] | None = None) -> Truth:
        """Where a bug shows first and how large it is, measured in FP32; among these modules, if they are given."""
        model = self.port(torch.float32)
        fault.plant(model, severity)
        planted = observe(model, self.encoded, self.generation)
        found = effects(self._reference, self._baseline, planted)
        compared = [effect for effect in found if modules is None or effect.module in modules]
        return truth_of(fault, compared, inputs=self.settings.inputs)

    def noise_of(self, model: Any) -> float:
        """The largest effect of an FP32 port that should compute the same as the reference."""
        found = effects(self._reference, self._baseline, observe(model, self.encoded, self.generation))
        return max(effect.size for effect in found)

    # What the analysis says

    def examine(
        self, model: Any, name: str, *, generation: Generation | None = None, run: Driver | None = None
    ) -> Report:
        """Record a target into a copy of the trace, and analyse it.

        Args:
            model: the target.
            name: of its trace.
            generation: how prompts are batched, if differently.
            run: records the target in another way than prefill and decode in batches.
        """
        trace = self.copy(self.folder(name))
        batches = generation or self.generation
        started = time.perf_counter()
        facts = {
            "checkpoint_fingerprint": checkpoint_fingerprint(ModelSource(self.checkpoint.folder)),
            "config": self.trace.manifest(REFERENCE).provenance["config"],
            "teacher": REFERENCE,
            "generation": {"padding": batches.padding, "batch_size": batches.batch_size},
        }
        if run is not None:
            run(trace, model, self.encoded, {**facts, "chosen": self.selection})
            return analyse(trace, {"capture": time.perf_counter() - started}, self.settings.replicates)
        run_recorded(
            trace,
            model,
            HuggingFaceCausalModel(model),
            self.encoded,
            batches,
            run=TARGET,
            role="target",
            stack="hf",
            model_name=self.name,
            selection=self.selection,
            facts=facts,
        )
        return analyse(trace, {"capture": time.perf_counter() - started}, self.settings.replicates)

    def folder(self, name: str) -> Path:
        """Where the trace of a target lies."""
        return self.settings.scratch / "targets" / f"{self.name}-{name}"

    def copy(self, folder: Path) -> Trace:
        """A copy of the trace with reference and baseline."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.trace.path, folder, copy_function=_link_shards)
        return Trace.open(folder)


def _link_shards(source: str, target: str) -> str:
    """Copy, but link the shards: they are never written to again."""
    if source.endswith(".h5"):
        with suppress(OSError):
            os.link(source, target)
            return target
    return str(shutil.copy2(source, target))


def analyse(trace: Trace, seconds: dict[str, float], replicates: tuple[str, ...] = ()) -> Report:
    """Compare, localise and diagnose the target of a trace."""
    from tensorsleuth.analyze.diagnosis.examination import diagnose
    from tensorsleuth.analyze.localization.suspects import suspects

    errors: dict[str, str] = {}

    def stage(name: str, work: Callable[[], Any], otherwise: Any) -> Any:
        started = time.perf_counter()
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - a crash of one stage is a result, and the others still count
            errors[name] = f"{type(error).__name__}: {error}"
            return otherwise
        finally:
            seconds[name] = time.perf_counter() - started

    request = ComparisonRequest(REFERENCE, TARGET, BASELINE, replicates=replicates)
    summary = stage("compare", lambda: compare(trace, request), None)
    if summary is None:
        return Report("crash", "crash", (), (), (), errors, seconds, str(trace.path))
    found = stage("localize", lambda: suspects(trace, TARGET), ())
    named = stage("diagnose", lambda: diagnose(trace, TARGET), ())
    rows = trace.query(
        """SELECT module, phase, r_ratio, verdict FROM measurements
           WHERE comparison = ? AND prompt IS NULL ORDER BY phase = 'decode', exec_order, measurement""",
        [TARGET],
    ).to_pylist()
    findings = tuple(_finding(finding) for finding in named)
    faulty = [one for finding, one in zip(named, findings, strict=True) if finding.is_fault]
    convicted = [one for finding, one in zip(named, findings, strict=True) if finding.evidence.get("in_noise")]
    return Report(
        "fail" if faulty else summary.verdict,
        summary.verdict,
        (*convicted, *(Suspected(s.module, s.site, s.phase, s.kind, s.r_ratio) for s in found)),
        findings,
        tuple((row["module"], row["phase"], row["r_ratio"], row["verdict"]) for row in rows),
        errors,
        seconds,
        str(trace.path),
    )


def _finding(finding: Any) -> Suspected:
    module = finding.site.partition(":")[0].partition("[")[0]
    module = "" if module == "(root)" else module
    ratio = finding.evidence.get("r_ratio")
    return Suspected(module, finding.site, finding.phase, "finding", ratio, finding.cause, finding.confidence)
