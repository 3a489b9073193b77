"""One rank of a capture on a CPU: `python -m tensorsleuth.capture.nxdi.worker JOB RANK PIPE PARENT`.

It builds its part of the port, says so, waits for the run to be entered, records, and reports.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ...store.manifest import Module, PromptTokens, RunManifest
from ...store.run_writer import RunWriter
from ..drive import bare_prefill, observer_effect, run_prompts
from ..hf import parse_dtype, quiet_transformers
from ..provenance import weights_fingerprint
from .application import CpuSettings, build_application, build_config
from .device_plan import ON_DEVICE_SAMPLING
from .encoder_decoder import drive_of
from .job import RankJob
from .port import activate, load_class, parse_class
from .rank_process import join_ranks, run_rank
from .ranks import Parent
from .taking import distinct_models, modules_of, take_from_hooks, take_from_library


def main(arguments: list[str]) -> int:
    """Run one rank; returns the exit code."""
    return run_rank(arguments, lambda path, rank, parent: _run(RankJob.read(path), rank, parent))


def _run(job: RankJob, rank: int, parent: Parent) -> None:
    quiet_transformers()
    torch.set_num_threads(max((os.cpu_count() or 1) // job.tp, 1))
    activate()
    port = load_class(parse_class(job.port))
    config_class = load_class(parse_class(job.config)) if job.config else port.get_config_cls()
    settings = CpuSettings(parse_dtype(job.dtype), job.tp, job.generation.batch_size, job.length, job.options)
    join_ranks(job.rendezvous, rank, job.tp)
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


def _record(
    job: RankJob, rank: int, parent: Parent, application: Any, settings: CpuSettings, manifest: RunManifest
) -> None:
    models = distinct_models(application)
    tokens: list[PromptTokens] = []
    facts: dict[str, Any] = {}

    def current() -> bytes:
        return dataclasses.replace(manifest, tokens=tuple(tokens), modules=modules_of(models[0])).to_json()

    drive = drive_of(application, models[0], settings, job.generation.pad_token)
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
