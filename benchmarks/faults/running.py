"""Targets of the benchmark by name, run one by one or in processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from functools import cache
from itertools import repeat

import torch

from . import nxdi_targets
from .architectures import ARCHITECTURES
from .attention_faults import ATTENTION_FAULTS
from .bench import Bench, Report, Settings
from .block_faults import BLOCK_FAULTS
from .clean_variants import VARIANTS
from .fault import Fault, label
from .scoring import CleanOutcome, Outcome, judge, judge_clean
from .weight_faults import WEIGHT_FAULTS

#: Called after every target with all outcomes so far.
After = Callable[[Sequence[Outcome], Sequence[CleanOutcome]], None]
FAULTS: dict[str, Fault] = {fault.name: fault for fault in (*ATTENTION_FAULTS, *WEIGHT_FAULTS, *BLOCK_FAULTS)}


@dataclasses.dataclass(frozen=True)
class Target:
    """One planted bug or one correct port; `ranks` is 0 for ports of the benchmark, else of NxD Inference."""

    architecture: str
    fault: str
    severity: str
    ranks: int = 0

    @property
    def port(self) -> str:
        """The architecture, and whether it is a port of NxD Inference on so many ranks."""
        return f"{self.architecture}+nxdi{self.ranks}" if self.ranks else self.architecture

    @property
    def name(self) -> str:
        """As `--only` matches it."""
        return f"{self.port}/{self.fault}/{self.severity}"


def targets(only: Sequence[str]) -> list[Target]:
    """Every target whose name matches one of the globs; all by default."""
    listed = [target for name in ARCHITECTURES for target in _targets_of(name)]
    return [t for t in listed if not only or any(fnmatchcase(t.name, pattern) for pattern in only)]


def _targets_of(name: str) -> Iterator[Target]:
    architecture = ARCHITECTURES[name]
    for variant in VARIANTS:
        if variant.applies_to(architecture):
            yield Target(name, "clean", variant.name)
    for ranks in nxdi_targets.RANKS.get(name, ()):
        yield Target(name, "clean", f"nxdi-{ranks}", ranks)
    for fault in FAULTS.values():
        if fault.applies_to(architecture):
            for severity in fault.severities:
                yield Target(name, fault.name, label(severity))
                if nxdi_targets.can_be_planted(fault, severity, name):
                    for ranks in nxdi_targets.RANKS[name]:
                        yield Target(name, fault.name, label(severity), ranks)


@cache
def _bench(name: str, settings: Settings) -> Bench:
    torch.set_num_threads(1)
    return Bench(name, settings)


def prepare(name: str, settings: Settings) -> str:
    """Train an architecture and capture its reference and baseline, unless that was done."""
    started = time.perf_counter()
    _ = _bench(name, settings).trace
    return f"{name}: ready after {time.perf_counter() - started:.0f} s"


def run(target: Target, settings: Settings, keep: bool) -> Outcome | CleanOutcome:
    """Record and judge one target; its trace is deleted unless it is to be kept."""
    bench = _bench(target.architecture, settings)
    name = f"{target.fault}-{target.severity}{f'-nxdi{target.ranks}' if target.ranks else ''}"
    name = name.replace("/", "-").replace(" ", "-")
    if target.fault == "clean":
        if target.ranks:
            report = nxdi_targets.examine(bench, None, None, target.ranks, name)
        else:
            report = next(v for v in VARIANTS if v.name == target.severity).examine(bench, name)
        outcome: Outcome | CleanOutcome = judge_clean(target.port, target.severity, report)
        good = outcome.verdict == "pass"
    else:
        outcome, report = _planted(bench, target, name)
        good = is_right(outcome) and (outcome.visible or not outcome.detected)
    if good or not keep:
        shutil.rmtree(report.folder, ignore_errors=True)
    return outcome


def _planted(bench: Bench, target: Target, name: str) -> tuple[Outcome, Report]:
    fault = FAULTS[target.fault]
    severity = next(s for s in fault.severities if label(s) == target.severity)
    if target.ranks:
        report = nxdi_targets.examine(bench, fault, severity, target.ranks, name)
        # The library's ports lack some modules, so the bug shows later; sites that are not compared do not count.
        expected = bench.truth(fault, severity, frozenset(row[0] for row in report.measured))
    else:
        expected = bench.truth(fault, severity)
        model = bench.port(torch.bfloat16)
        fault.plant(model, severity)
        report = bench.examine(model, name)
    return judge(target.port, fault, severity, expected, report), report


def is_right(outcome: Outcome) -> bool:
    """Whether everything about a planted bug was said rightly; nothing need be said when it is below the noise."""
    if outcome.errors or outcome.confident_wrong:
        return False
    return not outcome.visible or (outcome.detected and outcome.origin_rank == 1 and outcome.cause_right)


def line(outcome: Outcome | CleanOutcome) -> str:
    """One line about a target."""
    if isinstance(outcome, CleanOutcome):
        said = f"largest R {outcome.largest_r:.3g} at {outcome.largest_module}, {outcome.n_failing} fail"
        return (
            f"{outcome.architecture:13} {'clean':24} {outcome.variant:17} {outcome.verdict:10} {said} {outcome.named}"
        )
    effect = f"{'' if outcome.visible else 'below '}{outcome.size:.3g}"
    rank = f"origin {outcome.origin_rank or 'missed'}"
    cause = f"{outcome.named or '-'} {outcome.confidence:.2f} {'ok' if outcome.cause_right else 'NOT ' + outcome.cause}"
    return (
        f"{outcome.architecture:13} {outcome.fault:24} {outcome.severity:12} effect {effect:14} {outcome.verdict:10} "
        f"{rank:14} {outcome.first:52} {cause} {outcome.errors or ''}"
    )


def run_all(
    chosen: Sequence[Target], settings: Settings, jobs: int, *, keep: bool, after: After
) -> tuple[list[Outcome], list[CleanOutcome], list[str]]:
    """Run targets in processes and print a line for each; the names of those that could not be run come last."""
    faults: list[Outcome] = []
    clean: list[CleanOutcome] = []
    broken: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for note in pool.map(prepare, dict.fromkeys(t.architecture for t in chosen), repeat(settings)):
            print(note, flush=True)
        started = time.perf_counter()
        waiting = {pool.submit(run, target, settings, keep): target for target in chosen}
        for number, done in enumerate(as_completed(waiting), 1):
            try:
                outcome = done.result()
            except Exception as error:  # noqa: BLE001 - one target that cannot be made must not cost the others
                print(f"{waiting[done].name} could not be run: {type(error).__name__}: {error}", flush=True)
                broken.append(waiting[done].name)
                continue
            (clean if isinstance(outcome, CleanOutcome) else faults).append(outcome)  # type: ignore[arg-type]
            passed = time.perf_counter() - started
            left = passed / number * (len(chosen) - number)
            print(f"{number:4}/{len(chosen)} {left / 60:4.0f} min left  {line(outcome)}", flush=True)
            after(faults, clean)
    return faults, clean, broken
