"""Validating a port against the model it was made from: smoke test, accuracy, performance.

Accuracy is a comparison in a trace: the Hugging Face model in FP32 generates greedily, its BF16 run and the port are
forced to the same tokens through prefill and decode, and, if the port ever chooses another one, it also runs free.
Settings are the same on both sides: greedy, no penalties, no chat template, the model's own stop tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ...analyze.compare import ComparisonRequest, compare
from ...analyze.logits import judge_logits
from ...analyze.verdict import Thresholds
from ...capture.generate import Generation
from ...capture.hf import ModelSource, load_config, load_tokenizer
from ...capture.hf_run import HuggingFaceCapture, capture_hugging_face
from ...capture.nxdi.run import NxdiCapture, capture_on_cpu
from ...capture.prompts import PromptInput
from ...capture.selection import Selection
from ...store.errors import InputError, SleuthError
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from .coherence import incoherence
from .device_logits import capture_device_logits
from .matching import TokenMatch, forced_misses, token_match
from .sampling import Sampling
from .session import Answers, CpuPort, DevicePort, answer_on_cpu, length_for
from .validation_config import PROMPTS, ValidationConfig

MODES = ("token", "logit", "comprehensive")
_COMPARISON, _FREE = "port", "port-free"
_TOKENS_WITHOUT_TOKENIZER = 8


@dataclass(frozen=True)
class Plan:
    """How a validation is run.

    Attributes:
        mode: `token`, `logit` or `comprehensive` (both, and every module's tensors).
        hf_dtype: dtype of the golden reference.
        cpu: run the port on this CPU.
        smoke: run the smoke test.
        accuracy: compare with the Hugging Face model.
        performance: measure.
        go_on: go on after a stage failed.
        include: globs over modules to record; the head in modes `token` and `logit`, all in `comprehensive`.
    """

    mode: str = "token"
    hf_dtype: str = "float32"
    cpu: bool = False
    smoke: bool = True
    accuracy: bool = True
    performance: bool = False
    go_on: bool = False
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the mode.

        Raises:
            InputError: it is not known.
        """
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown; choose {', '.join(MODES)}")


@dataclass
class Stage:
    """One stage of one case.

    Attributes:
        name: `smoke`, `accuracy` or `performance`.
        verdict: `pass`, `fail` or `undecided`.
        summary: the verdict in words.
        details: figures, JSON-ready.
        seconds: wall time.
    """

    name: str
    verdict: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class CaseReport:
    """One batch size and sequence length.

    Attributes:
        batch_size, seq_len: the case.
        stages: what was run.
        trace: folder of the trace, empty without accuracy.
        notes: what to know about the figures.
    """

    batch_size: int
    seq_len: int
    stages: list[Stage] = field(default_factory=list)
    trace: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`fail` if a stage failed, `undecided` if one is, or if there is none."""
        verdicts = [stage.verdict for stage in self.stages]
        if "fail" in verdicts:
            return "fail"
        return "undecided" if "undecided" in verdicts or not verdicts else "pass"


def validate(
    config: ValidationConfig, plan: Plan, results: Path, *, progress: Progress = no_progress
) -> list[CaseReport]:
    """Validate a port, write a result file for every case, and keep the traces.

    Args:
        config: what is validated.
        plan: how.
        results: folder for results; made if missing.
        progress: told about stages on the way.

    Raises:
        InputError: the configuration does not fit the model, or there is nothing to run on.
    """
    if not plan.cpu and config.compiled_model_path is None:
        raise InputError("the configuration names no compiled_model_path; compile the port, or validate with --cpu")
    results.mkdir(parents=True, exist_ok=True)
    reports = []
    for batch, seq_len in config.test_parameters:
        case = _Case(config, plan, results, batch, seq_len, progress)
        reports.append(case.run())
        body = {
            "model_name": config.model_name,
            "mode": plan.mode,
            "verdict": case.report.verdict,
            **asdict(case.report),
        }
        name = f"validation_{plan.mode}_b{batch}_s{case.report.seq_len}.json"
        (results / name).write_text(json.dumps(body, indent=1, default=str) + "\n", encoding="utf-8")
        if case.report.verdict == "fail" and not plan.go_on:
            break
    return reports


class _Case:
    """One batch size and sequence length."""

    def __init__(
        self, config: ValidationConfig, plan: Plan, results: Path, batch: int, seq_len: int, progress: Progress
    ) -> None:
        self._config, self._plan, self._results, self._progress = config, plan, results, progress
        self._prompts, self._ids = _prompts(config)
        needed = length_for(self._ids, config.num_tokens_to_check)
        if seq_len and seq_len < max(map(len, self._ids)) + config.num_tokens_to_check:
            raise InputError(
                f"prompts and {config.num_tokens_to_check} tokens do not fit seq_len {seq_len}; choose fewer tokens"
            )
        self._batch, self._length = batch, seq_len or needed
        self.report = CaseReport(batch, self._length)

    def run(self) -> CaseReport:
        """Run the stages."""
        plan = self._plan
        stages: list[tuple[bool, str, Callable[[], Stage]]] = [
            (plan.smoke, "smoke", self._smoke),
            (plan.accuracy, "accuracy", self._accuracy),
            (plan.performance, "performance", self._performance),
        ]
        for wanted, name, stage in stages:
            if not wanted:
                self.report.notes.append(f"{name} was not checked")
                continue
            self._progress(name, len(self.report.stages), sum(one for one, _, _ in stages))
            started = time.perf_counter()
            try:
                outcome = stage()
            except SleuthError as error:
                outcome = Stage(name, "fail", str(error))
            outcome.seconds = time.perf_counter() - started
            self.report.stages.append(outcome)
            if outcome.verdict == "fail" and not plan.go_on:
                break
        return self.report

    def _answers(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Answers:
        config, sampling = self._config, Sampling(new_tokens=new_tokens)
        if self._plan.cpu:
            return answer_on_cpu(self._cpu_port(), prompts, sampling)
        assert config.compiled_model_path is not None
        return DevicePort(config.model_class, config.compiled_model_path).answer(prompts, sampling)

    def _cpu_port(self) -> CpuPort:
        config = self._config
        return CpuPort(
            config.model_path,
            config.model_class,
            config.config_class,
            config.dtype,
            config.tp_degree,
            self._batch,
            self._length,
            config.neuron_options,
        )

    def _smoke(self) -> Stage:
        """The port loads, and its first tokens come from finite logits."""
        found = self._answers(self._ids[:1], 4)
        (answer,) = found.answers
        details = {"load_seconds": found.load_seconds, "tokens": list(answer.tokens)}
        if answer.n_nonfinite:
            return Stage("smoke", "fail", f"logits hold NaN or infinity in {answer.n_nonfinite} steps", details)
        return Stage("smoke", "pass", f"loads in {found.load_seconds:.1f} s and answers", details)

    def _accuracy(self) -> Stage:
        trace = Trace.create(_free_folder(self._results, f"trace-b{self._batch}-s{self._length}"))
        self.report.trace = str(trace.path)
        source, n_tokens = ModelSource(self._config.model_path), self._config.num_tokens_to_check
        generation = Generation(new_tokens=n_tokens, padding="right", batch_size=self._batch)
        every = self._plan.mode == "comprehensive"
        selection = Selection(include=self._plan.include or (() if every else ("lm_head",)))
        if self._plan.hf_dtype not in ("float32", "fp32"):
            self.report.notes.append(f"the golden reference is {self._plan.hf_dtype}, not float32")
        for run, role, dtype, teacher in (
            ("golden", "reference", self._plan.hf_dtype, None),
            ("baseline", "baseline", self._config.dtype, "golden"),
        ):
            capture = HuggingFaceCapture(
                source, run, role, dtype, self._prompts if teacher is None else (), teacher, generation, selection
            )
            capture_hugging_face(trace, capture, progress=self._progress)
        self._capture_port(trace, _COMPARISON, "golden", generation, selection)
        request = ComparisonRequest("golden", _COMPARISON, "baseline", _COMPARISON, Thresholds())
        compared = compare(trace, request, progress=self._progress)
        logits = judge_logits(trace, _COMPARISON, progress=self._progress)
        free = None
        if forced_misses(trace, _COMPARISON):
            self._capture_port(trace, _FREE, None, generation, Selection(include=("lm_head",)))
            free = _FREE
        tokens = token_match(trace, _COMPARISON, "golden", free)
        verdicts = {"token": tokens.verdict, "logit": logits.verdict, "sites": compared.verdict}
        return self._judged(tokens, verdicts, list(logits.reasons), list(compared.reasons), free is not None)

    def _capture_port(
        self, trace: Trace, run: str, teacher: str | None, generation: Generation, selection: Selection
    ) -> None:
        """Record the port, forced to the tokens of a teacher, or free."""
        config = self._config
        capture = NxdiCapture(
            model=config.model_path,
            port=config.model_class,
            run=run,
            role="target",
            config=config.config_class,
            dtype=config.dtype,
            tp=config.tp_degree,
            prompts=self._prompts if teacher is None else (),
            teacher=teacher,
            generation=generation,
            selection=selection,
            length=self._length,
            options=dict(config.neuron_options),
        )
        if self._plan.cpu:
            capture_on_cpu(trace, capture, progress=self._progress)
        else:
            assert config.compiled_model_path is not None
            capture_device_logits(trace, capture, config.compiled_model_path, progress=self._progress)

    def _judged(
        self, tokens: TokenMatch, verdicts: dict[str, str], logits: list[str], sites: list[str], free: bool
    ) -> Stage:
        wanted = {"token": ("token",), "logit": ("logit",), "comprehensive": ("token", "logit", "sites")}[
            self._plan.mode
        ]
        chosen = [verdicts[name] for name in wanted]
        verdict = "fail" if "fail" in chosen else "undecided" if "undecided" in chosen else "pass"
        details = {
            "greedy_match": tokens.greedy,
            "teacher_forced_match": tokens.forced,
            "misses": tokens.n_missed,
            "misses_explained_by_rounding": tokens.explained,
            "ran_free": free,
            "prompts": [asdict(one) for one in tokens.prompts],
            "verdicts": verdicts,
            "logit_reasons": logits,
            "site_reasons": sites,
        }
        summary = tokens.reason
        if "logit" in wanted:
            summary += f"; logits: {verdicts['logit']}"
        if "sites" in wanted:
            summary += f"; sites: {verdicts['sites']}"
        if verdict != "pass":
            commands = f"sleuth logits {self.report.trace} {_COMPARISON}"
            if self._plan.mode == "comprehensive":
                commands += "".join(
                    f"; sleuth {verb} {self.report.trace} {_COMPARISON}" for verb in ("localize", "diagnose")
                )
            else:
                commands += "; or validate with --mode comprehensive, which records every module for sleuth localize"
            self.report.notes.append(f"next: {commands}")
        return Stage("accuracy", verdict, summary, details)

    def _performance(self) -> Stage:
        """Time to the first token and throughput, against what is expected, if that is said."""
        config = self._config
        found = self._answers(self._ids, config.num_tokens_to_check)
        ttft = 1e3 * median(answer.first_seconds for answer in found.answers)
        rate = sum(len(a.tokens) for a in found.answers) / sum(a.seconds for a in found.answers)
        details: dict[str, Any] = {"ttft_ms_p50": ttft, "tokens_per_second": rate, "on_cpu": self._plan.cpu}
        details["incoherent"] = [why for a in found.answers if (why := incoherence(a.tokens))]
        problems = []
        if config.expected_ttft_ms is not None and ttft > 1.1 * config.expected_ttft_ms:
            problems.append(f"TTFT {ttft:.1f} ms is over 1.1 x {config.expected_ttft_ms:g} ms")
        if config.expected_tokens_per_second is not None and rate < 0.9 * config.expected_tokens_per_second:
            problems.append(f"{rate:.1f} tokens/s are under 0.9 x {config.expected_tokens_per_second:g}")
        if self._plan.cpu:
            self.report.notes.append("performance was measured on a CPU, which says nothing of a device")
        text = f"TTFT {ttft:.1f} ms (median), {rate:.1f} tokens/s"
        return Stage("performance", "fail" if problems else "pass", "; ".join([text, *problems]), details)


def _prompts(config: ValidationConfig) -> tuple[list[PromptInput], list[list[int]]]:
    """Prompts and their tokens; without a tokenizer and prompts, fixed token ids."""
    source = ModelSource(config.model_path)
    tokenize = load_tokenizer(source)
    given: Sequence[str | tuple[int, ...]] = config.prompts
    if not given and tokenize is not None:
        given = PROMPTS
    if not given:
        vocabulary = int(load_config(source).get_text_config().vocab_size)
        count = _TOKENS_WITHOUT_TOKENIZER
        given = [tuple((7 * row + 3 * place + 1) % vocabulary for place in range(count)) for row in range(len(PROMPTS))]
    prompts, ids = [], []
    for number, one in enumerate(given):
        if isinstance(one, str):
            if tokenize is None:
                raise InputError(f"{config.model_path} has no tokenizer; give prompts as lists of token ids")
            prompts.append(PromptInput(str(number), text=one))
            ids.append(tokenize(one))
        else:
            prompts.append(PromptInput(str(number), token_ids=one))
            ids.append(list(one))
    return prompts, ids


def _free_folder(parent: Path, name: str) -> Path:
    """A folder that does not exist yet."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder
