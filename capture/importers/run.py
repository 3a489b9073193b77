"""One import, from a folder of files to a finished run."""

from __future__ import annotations

import datetime
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...store.errors import InputError, RunExistsError
from ...store.manifest import ROLES, Module, RunManifest
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..provenance import environment
from .dump import DumpFile, Plan, Report, list_files
from .evidence import token_rows
from .folder import plan_folder
from .formats import FORMATS, detect
from .nxdi import plan_nxdi
from .tokens import Hints, read_tokens, tokens_of_run, widths_of_run
from .vllm_neuron import plan_vllm_neuron
from .writing import Written, write_ranks

#: Bytes that may wait for the disk; mapped files make more of it pointless.
_QUEUE_BYTES = 64 << 20


@dataclass(frozen=True)
class ImportOptions:
    """What is known about a dump besides its files.

    Attributes:
        tokens: a tokens file, see `tokens.read_tokens`.
        tokens_from: a run of the trace that computed the same prompts.
        tp: tensor-parallel degree, where the files do not tell (NxD Inference dumps rank 0 only).
        rank: the rank that a dump of one rank comes from.
    """

    tokens: Path | None = None
    tokens_from: str | None = None
    tp: int = 1
    rank: int = 0


@dataclass(frozen=True)
class ImportSummary:
    """What an import did.

    Attributes:
        run: its name.
        format: layout of the dump.
        stack: stack of the run.
        n_files: tensor files in the dump.
        n_tensors: rows in the index.
        nbytes: size of all values.
        stored_nbytes: bytes written, equal contents once.
        n_prompts: prompts with tokens.
        tp: tensor-parallel degree.
        positions: how many of the imported tensors have positions.
        skipped: what was left out, `{file: reason}`.
        notes: what was imported but needs a word, `{file: note}`.
        assumptions: what was inferred or assumed.
        seconds: wall time.
    """

    run: str
    format: str
    stack: str
    n_files: int
    n_tensors: int
    nbytes: int
    stored_nbytes: int
    n_prompts: int
    tp: int
    positions: int
    skipped: dict[str, str]
    notes: dict[str, str]
    assumptions: list[str]
    seconds: float


def import_dump(
    trace: Trace,
    source: Path | str,
    *,
    run: str,
    role: str,
    format: str = "auto",
    options: ImportOptions | None = None,
    progress: Progress = no_progress,
) -> ImportSummary:
    """Import what another tool dumped as a run of a trace.

    Files are read one at a time and only as data. A file that cannot be used is reported and the others go on.

    Args:
        trace: the trace that receives the run.
        source: the dump: a folder, or one file.
        run: name of the new run.
        role: `reference`, `baseline` or `target`.
        format: `auto` or a name of `FORMATS`.
        options: tokens and tensor-parallel degree.
        progress: called with a stage, files done and files in all.

    Raises:
        InputError: an argument or the tokens cannot be used, or nothing could be imported; no run is left behind.
        RunExistsError: the run name is taken.
        StorageError: values could not be written; no run is left behind.
    """
    started = time.perf_counter()
    options = options or ImportOptions()
    _check(trace, run, role, format, options)
    source, report = Path(source), Report()
    files = list_files(source, report)
    chosen = detect(source, files) if format == "auto" else format
    plan = _plan(chosen, source, files, _hints(trace, options), report, progress)
    if not plan.tensors:
        raise InputError(_nothing(source, chosen, files, report))
    written, facts = _write(trace, source, chosen, plan, report, run, role, options, progress)
    return ImportSummary(
        run=run,
        format=chosen,
        stack=plan.stack,
        n_files=len(files),
        n_tensors=written.n_tensors,
        nbytes=written.nbytes,
        stored_nbytes=written.stored_nbytes,
        n_prompts=len(plan.prompts),
        tp=plan.tp,
        positions=written.positions,
        skipped=facts["skipped"],
        notes=report.notes,
        assumptions=report.assumptions,
        seconds=time.perf_counter() - started,
    )


def _check(trace: Trace, run: str, role: str, format_: str, options: ImportOptions) -> None:
    if role not in ROLES:
        raise InputError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
    if format_ not in ("auto", *FORMATS):
        raise InputError(f"format {format_!r} is unknown; choose one of auto, {', '.join(FORMATS)}")
    if options.tokens is not None and options.tokens_from is not None:
        raise InputError("give either --tokens or --tokens-from, not both")
    if not 0 <= options.rank < options.tp:
        raise InputError(f"rank {options.rank} of {options.tp} is not possible; ranks count from 0 to below --tp")
    if trace.run_folder(run).exists():
        raise RunExistsError(f"{trace.path} already has a run {run!r}; choose another --run name")


def _hints(trace: Trace, options: ImportOptions) -> Hints:
    if options.tokens is not None:
        return Hints(read_tokens(options.tokens), tp=options.tp, rank=options.rank)
    if options.tokens_from is None:
        return Hints(tp=options.tp, rank=options.rank)
    run = options.tokens_from
    return Hints(tokens_of_run(trace, run), token_rows(trace, run), widths_of_run(trace, run), options.tp, options.rank)


def _plan(
    chosen: str, source: Path, files: Sequence[DumpFile], hints: Hints, report: Report, progress: Progress
) -> Plan:
    if chosen == "vllm-neuron":
        return plan_vllm_neuron(source, files, report, hints=hints, progress=progress)
    if chosen == "tensors":
        return plan_folder(files, report, hints=hints, progress=progress)
    stack = "nxdi" if chosen == "nxdi" else "import"
    return plan_nxdi(source, files, report, stack=stack, hints=hints, progress=progress)


def _nothing(source: Path, chosen: str, files: Sequence[DumpFile], report: Report) -> str:
    reasons = "; ".join(f"{file}: {reason}" for file, reason in list(report.skipped.items())[:3])
    more = len(report.skipped) - 3
    return (
        f"nothing could be imported from {source} as {chosen} ({len(files)} tensor files; expected {FORMATS[chosen]}): "
        f"{reasons or 'no file fits'}{f'; and {more} more' if more > 0 else ''}"
    )


def _write(
    trace: Trace,
    source: Path,
    chosen: str,
    plan: Plan,
    report: Report,
    run: str,
    role: str,
    options: ImportOptions,
    progress: Progress,
) -> tuple[Written, dict[str, Any]]:
    """Write the planned tensors; a run of which nothing was stored is taken back."""
    facts: dict[str, Any] = {
        **environment(),
        "import": {
            "source": str(source),
            "format": chosen,
            "tokens": str(options.tokens) if options.tokens else None,
            "tokens_from": options.tokens_from,
            "assumptions": report.assumptions,
            "notes": report.notes,
        },
        "skipped": report.skipped,
    }
    manifest = trace.begin_run(_manifest(run, role, str(source), plan, facts))
    written = Written()
    finished = False
    try:
        write_ranks(trace, manifest, plan, report, written, progress)
        if written.n_tensors == 0:
            raise InputError(_nothing(source, chosen, [], report))
        facts["captured"] = {k: v for k, v in asdict(written).items() if k not in ("orders", "positions")}
        modules = tuple(
            Module(path, "", path.rpartition(".")[0] if path else None, path.count(".") + 1 if path else 0, order, 0)
            for path, order in sorted(written.orders.items(), key=lambda item: item[1])
        )
        finished = True
    finally:
        if not finished:
            shutil.rmtree(trace.run_folder(run), ignore_errors=True)
    trace.finish_run(replace(manifest, status="complete", provenance=facts, modules=modules))
    return written, facts


def _manifest(run: str, role: str, model: str, plan: Plan, facts: dict[str, Any]) -> RunManifest:
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        sizes[tensor.dtype] += 1
    return RunManifest(
        ordinal=0,
        run=run,
        role=role,
        stack=plan.stack,
        model=model,
        dtype=sizes.most_common(1)[0][0],
        device="unknown",
        tp=plan.tp,
        status="running",
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        provenance=facts,
        prompts=plan.prompts,
        tokens=plan.tokens,
    )
