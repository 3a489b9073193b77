"""One rank of a capture on a CPU: `python -m tensorsleuth.capture.nxdi.worker JOB RANK PIPE PARENT`.

It builds its part of the port, says so, waits for the run to be entered, records, and reports.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from ...store.errors import SleuthError
from ...store.manifest import Module, PromptTokens, RunManifest
from ...store.run_writer import RunWriter
from ..drive import bare_prefill, observer_effect, run_prompts
from ..hf import parse_dtype, quiet_transformers
from ..provenance import weights_fingerprint
from .adapter import NxdiCausalModel
from .application import CpuSettings, build_application, build_config
from .device_plan import ON_DEVICE_SAMPLING
from .job import RankJob
from .port import activate, load_class, parse_class
from .ranks import Parent
from .taking import distinct_models, modules_of, take_from_hooks, take_from_library

#: Interface for the ranks' sockets: they are on one machine.
_LOOPBACK = "lo"


def main(arguments: list[str]) -> int:
    """Run one rank; returns the exit code."""
    job_path, rank, events, parent_id = arguments
    parent = Parent(int(events), int(parent_id))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        _run(RankJob.read(Path(job_path)), int(rank), parent)
    except Exception as error:  # noqa: BLE001 (reported to the parent, which raises it)
        traceback.print_exc()
        expected = isinstance(error, SleuthError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        parent.tell("error", message=text, expected=expected)
        return 1
    return 0


def _run(job: RankJob, rank: int, parent: Parent) -> None:
    quiet_transformers()
    torch.set_num_threads(max((os.cpu_count() or 1) // job.tp, 1))
    activate()
    port = load_class(parse_class(job.port))
    config_class = load_class(parse_class(job.config)) if job.config else port.get_config_cls()
    settings = CpuSettings(parse_dtype(job.dtype), job.tp, job.generation.batch_size, job.length, job.options)
    _join(job, rank)
    if job.library_capture:
        settings = dataclasses.replace(settings, options={**ON_DEVICE_SAMPLING, **settings.options})
    config = build_config(port, config_class, Path(job.model), settings)
    application = build_application(port, config, Path(job.model), rank, job.tp)
    parent.tell("ready")
    answer = parent.wait()
    if not answer:
        return
    manifest = RunManifest.from_json(Path(answer).read_bytes(), answer)
    _record(job, rank, parent, application, settings, manifest)
    torch.distributed.destroy_process_group()


def _join(job: RankJob, rank: int) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    torch.distributed.init_process_group("gloo", init_method=f"file://{job.rendezvous}", rank=rank, world_size=job.tp)


def _record(
    job: RankJob, rank: int, parent: Parent, application: Any, settings: CpuSettings, manifest: RunManifest
) -> None:
    models = distinct_models(application)
    tokens: list[PromptTokens] = []
    facts: dict[str, Any] = {}

    def current() -> bytes:
        return dataclasses.replace(manifest, tokens=tuple(tokens), modules=modules_of(models[0])).to_json()

    drive = NxdiCausalModel(
        application,
        batch=settings.batch,
        length=settings.length,
        pad_token=job.generation.pad_token,
        one_by_one=settings.continuous_batching,
    )
    with torch.no_grad():
        bare = bare_prefill(drive, job.prompts, job.generation)
        facts["weights_fingerprint"] = weights_fingerprint(models[0])
        writer = RunWriter(
            Path(job.run_folder), job.run, rank=rank, statistics_only=job.statistics_only, manifest=current
        )
        taking = take_from_library if job.library_capture else take_from_hooks
        reporter = _Reporter(parent, rank)
        modules: tuple[Module, ...] = ()
        try:
            with taking(job, rank, models, writer, facts) as (recorders, options):
                drive.recorders, drive.options = recorders, options
                captured = run_prompts(drive, job.prompts, job.generation, drive.step, tokens=tokens, progress=reporter)
            modules = facts.pop("modules", ())
            facts["observer_effect"] = observer_effect(bare, captured)
        finally:
            try:
                writer.close()
            finally:
                facts.pop("modules", None)
                parent.tell(
                    "result",
                    facts=facts,
                    totals=dataclasses.asdict(writer.totals),
                    tokens=[dataclasses.asdict(item) for item in tokens],
                    modules=[dataclasses.asdict(module) for module in modules or modules_of(models[0])],
                )


class _Reporter:
    """Sends rank 0's progress to the parent."""

    def __init__(self, parent: Parent, rank: int) -> None:
        self._parent, self._rank = parent, rank

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if self._rank == 0:
            self._parent.tell("progress", stage=stage, done=done, total=total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
