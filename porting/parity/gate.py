"""The parity gate: a port's numbers against the model's, prefill and decode, in FP32 and BF16, on one and two ranks.

The checkpoint is small and hostile (`spec.hostile`). In FP32, every site may differ from the reference by rounding
alone; in BF16, every site may make no more than the baseline's error times tau_R, or what clean runs that round
elsewhere make, and logits no more than tau_R. Every check is a comparison in a trace, so that what fails can be
looked into afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...analyze.compare import ComparisonRequest, ComparisonSummary, compare
from ...analyze.sites import sites_of
from ...analyze.sql_library import run_sql
from ...analyze.verdict import FAIL, PASS, UNDECIDED, Thresholds
from ...capture.generate import Generation
from ...capture.hf import ModelSource, load_config
from ...capture.hf_run import HuggingFaceCapture, capture_hugging_face
from ...capture.nxdi.run import NxdiCapture, capture_on_cpu
from ...capture.replicate import Replicate
from ...capture.selection import Selection
from ...store.errors import CaptureError, InputError
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..environment import find_environment, require_sources
from ..generator.generate import Port, generate, write_port
from ..spec.encoder_decoder_facts import AnyArchitecture
from ..spec.extract import analyse_model
from ..spec.hostile import hostile_model
from .subject import left_out, mapping_text, prompts_for, save

#: Largest relative L2 distance of a site in FP32.
TOLERANCE = 1e-5
REFERENCE, BASELINE = "fp32", "bf16"
#: Runs that show how clean runs scatter: ranks add up rounded parts, and the library rounds a product before it adds
#: the bias, as the first does; without them, whether R at a projection stays below its limit would be luck.
_REPLICATES = ("summation", "nudge")
_DECODED = 8
_PROMPTS = (5, 9, 12, 14, 17, 19, 22, 25, 27, 30)


@dataclass(frozen=True)
class Setting:
    """One way to run the port."""

    dtype: str
    tp: int

    @property
    def run(self) -> str:
        """Name of its run and comparison."""
        return f"{'fp32' if self.dtype == 'float32' else 'bf16'}-tp{self.tp}"


QUICK = (Setting("float32", 1),)
FULL = tuple(Setting(dtype, tp) for tp in (1, 2) for dtype in ("float32", "bfloat16"))


@dataclass(frozen=True)
class Check:
    """What one setting gave.

    Attributes:
        setting: dtype and ranks.
        verdict: `pass`, `fail` or `undecided`.
        reasons: why not `pass`.
        logits_error: relative L2 distance of the logits from the reference's, the worse of prefill and decode.
        logits_ratio: their R against the baseline over the tokens that count (those that no run sends to other
            experts), None in FP32.
        worst_site: the site with the largest error (FP32) or R (BF16).
        worst: that error or R.
        first_divergent: the first site that fails, empty without one.
        n_sites: pairs compared.
        n_unmatched: sites of the reference without counterpart.
        seconds: time for capture and comparison.
    """

    setting: Setting
    verdict: str
    reasons: tuple[str, ...]
    logits_error: float | None
    logits_ratio: float | None
    worst_site: str
    worst: float | None
    first_divergent: str
    n_sites: int
    n_unmatched: int
    seconds: float


@dataclass(frozen=True)
class GateReport:
    """The outcome.

    Attributes:
        architecture: what was ported.
        port: the generated files.
        port_file: where they were written.
        trace: folder of the trace.
        checks: one per setting.
        seconds_to_generate: time for analysis and generation.
    """

    architecture: AnyArchitecture
    port: Port
    port_file: Path
    trace: Path
    checks: tuple[Check, ...]
    seconds_to_generate: float

    @property
    def verdict(self) -> str:
        """`fail` if any check fails, else `undecided` if any is, else `pass`."""
        found = {check.verdict for check in self.checks}
        return FAIL if FAIL in found else UNDECIDED if UNDECIDED in found or not found else PASS


def check_model(
    model: Path, folder: Path, settings: Sequence[Setting] = FULL, *, seed: int = 0, progress: Progress = no_progress
) -> GateReport:
    """Analyse a model, generate its port, and check the port.

    Args:
        model: a model folder or a config.json.
        folder: receives the port, the small checkpoint and the trace; must not hold a trace yet.
        settings: what to run.
        seed: of weights and prompts.
        progress: called with a stage, steps done and steps in all.

    Raises:
        InputError: the model is not supported, or something on this machine is missing.
    """
    started = time.perf_counter()
    progress("analyze", 0, len(settings) + 2)
    architecture = analyse_model(model)
    port = generate(architecture)
    seconds = time.perf_counter() - started
    config = load_config(ModelSource(model)).get_text_config()
    file = write_port(port, folder)
    checks, trace = check_port(
        architecture, config, f"{file}:{port.class_name}", folder, settings, seed=seed, progress=progress
    )
    return GateReport(architecture, port, file, trace, checks, seconds)


def check_port(
    architecture: AnyArchitecture,
    config: object,
    port: str,
    folder: Path,
    settings: Sequence[Setting] = FULL,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[tuple[Check, ...], Path]:
    """Check a port file against the model of a configuration.

    Args:
        architecture: the model's description.
        config: the model's configuration; a small, hostile one is made of it.
        port: the port's class as FILE:CLASS.
        folder: receives checkpoint and trace.
        settings: what to run.
        seed: of weights and prompts.
        progress: called with a stage, steps done and steps in all.

    Returns:
        The checks, and the folder of the trace.

    Raises:
        InputError: the port cannot be built, or something on this machine is missing.
    """
    steps = len(settings) + 1
    progress("reference", 0, steps)
    gate = ParityGate(architecture, config, folder, seed=seed)
    checks = []
    for number, setting in enumerate(settings):
        progress(setting.run, number + 1, steps)
        checks.append(gate.check(port, setting))
    return tuple(checks), gate.trace.path


class ParityGate:
    """A small model whose values are known, to hold any number of ports against."""

    def __init__(
        self,
        architecture: AnyArchitecture,
        config: object,
        folder: Path,
        *,
        seed: int = 0,
        prompts: Sequence[int] = _PROMPTS,
    ) -> None:
        """Write the checkpoint and capture the reference.

        Args:
            architecture: the model's description.
            config: the model's configuration; a small, hostile one is made of it.
            folder: receives checkpoint and trace.
            seed: of weights and prompts.
            prompts: lengths of the prompts.

        Raises:
            InputError: the model cannot be built, or something on this machine is missing.
        """
        require_sources(find_environment())
        model = hostile_model(config, seed)
        self._architecture, self._config, self._folder, self._batch = architecture, model.config, folder, len(prompts)
        self._checkpoint = folder / "checkpoint"
        save(model, architecture, self._checkpoint, seed)
        self.trace = Trace.create(folder / "trace")
        self._selection = Selection(exclude=(*_without_effect(model), *left_out(architecture)))
        self._capture(
            HuggingFaceCapture(
                ModelSource(self._checkpoint, attention="eager"),
                REFERENCE,
                "reference",
                prompts=prompts_for(architecture, prompts, model.config.vocab_size, seed),
                generation=Generation(new_tokens=_DECODED + 1, batch_size=self._batch),
            )
        )
        self._recorded = {(info.site.module, info.site.slot) for info in sites_of(self.trace, REFERENCE)}

    def check(self, port: str, setting: Setting, name: str = "") -> Check:
        """Capture a port and compare it with the reference.

        Args:
            port: the port's class as FILE:CLASS.
            setting: how to run it.
            name: of the comparison; the setting's by default.
        """
        started = time.perf_counter()
        name = name or setting.run
        if setting.dtype == "bfloat16":
            self._capture_baselines()
        request = NxdiCapture(
            self._checkpoint,
            port,
            f"port-{name}",
            "target",
            dtype=setting.dtype,
            tp=setting.tp,
            teacher=REFERENCE,
            generation=Generation(batch_size=self._batch),
        )
        try:
            capture_on_cpu(self.trace, request)
        except (CaptureError, InputError) as error:
            reasons = (f"the port does not run: {error}",)
            return Check(setting, FAIL, reasons, None, None, "", None, "", 0, 0, time.perf_counter() - started)
        in_fp32 = setting.dtype == "float32"
        comparison = ComparisonRequest(
            REFERENCE,
            request.run,
            None if in_fp32 else BASELINE,
            name=name,
            thresholds=Thresholds(relative_l2=TOLERANCE) if in_fp32 else Thresholds(),
            mapping=self._mapping(setting.tp),
            replicates=() if in_fp32 else _REPLICATES,
        )
        summary = compare(self.trace, comparison)
        return _described(self.trace, setting, summary, time.perf_counter() - started)

    def _capture(self, capture: HuggingFaceCapture) -> None:
        capture_hugging_face(self.trace, replace(capture, selection=self._selection))

    def _capture_baselines(self) -> None:
        """The model in BF16, and its replicates, once."""
        if BASELINE in self.trace.run_names():
            return
        baseline = HuggingFaceCapture(
            ModelSource(self._checkpoint, attention="eager"),
            BASELINE,
            "baseline",
            "bfloat16",
            teacher=REFERENCE,
            generation=Generation(batch_size=self._batch),
        )
        self._capture(baseline)
        for kind in _REPLICATES:
            self._capture(replace(baseline, run=kind, replicate=Replicate(kind)))

    def _mapping(self, tp: int) -> Path:
        file = self._folder / f"component_mapping-tp{tp}.json"
        if not file.exists():
            file.write_text(mapping_text(self._architecture, self._config, tp, self._recorded))
        return file


def _without_effect(model: torch.nn.Module) -> Iterator[str]:
    """Modules that return what they are given: ports leave them out."""
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.Identity)):
            yield path


def held_to_logits(verdict: str, reasons: tuple[str, ...], ratio: float | None) -> tuple[str, tuple[str, ...]]:
    """A verdict on sites and its reasons, with the logits held to tau_R itself: replicates widen their limit, too.

    Args:
        verdict: of the comparison.
        reasons: why it is not `pass`.
        ratio: R of the logits, None in FP32.
    """
    limit = Thresholds().tau_r
    if verdict != PASS or ratio is None or ratio < limit:
        return verdict, reasons
    return UNDECIDED, (*reasons, f"R of the logits is {ratio:.2f}, not below {limit:g}; clean runs reach that here")


def _described(trace: Trace, setting: Setting, summary: ComparisonSummary, seconds: float) -> Check:
    by = "relative_l2" if setting.dtype == "float32" else "r_judged"
    rows = run_sql(
        trace,
        f"""SELECT site, phase, target_site, relative_l2, r_judged, verdict, state FROM measurements
            WHERE comparison = ? AND prompt IS NULL AND {by} IS NOT NULL ORDER BY {by} DESC, exec_order""",  # noqa: S608
        [summary.comparison],
    ).to_pylist()
    logits = [row for row in rows if row["site"].endswith("[logits]") or row["site"] == "(root)[0]"]
    first = run_sql(
        trace, "SELECT * FROM first_divergence WHERE comparison = ? AND overall", [summary.comparison]
    ).to_pylist()
    ratio = None if by == "relative_l2" else max((row["r_judged"] for row in logits), default=None)
    verdict, reasons = held_to_logits(summary.verdict, summary.reasons, ratio)
    return Check(
        setting=setting,
        verdict=verdict,
        reasons=reasons,
        logits_error=max((row["relative_l2"] for row in logits if row["relative_l2"] is not None), default=None),
        logits_ratio=ratio,
        worst_site=f"{rows[0]['site']} ({rows[0]['phase']})" if rows else "",
        worst=rows[0][by] if rows else None,
        first_divergent=f"{first[0]['site']} ({first[0]['phase']})" if first else "",
        n_sites=summary.n_matched,
        n_unmatched=summary.n_unmatched,
        seconds=seconds,
    )
