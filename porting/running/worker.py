"""One rank that answers prompts on a CPU: `python -m tensorsleuth.porting.running.worker JOB RANK PIPE PARENT`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...capture.hf import parse_dtype, quiet_transformers
from ...capture.nxdi.adapter import NxdiCausalModel
from ...capture.nxdi.application import CpuSettings, build_application, build_config
from ...capture.nxdi.port import activate, load_class, parse_class
from ...capture.nxdi.rank_process import join_ranks, run_rank
from ...capture.nxdi.ranks import Parent
from .sampling import Sampling, answer


def main(arguments: list[str]) -> int:
    """Run one rank; returns the exit code."""
    return run_rank(arguments, _run)


def _run(path: Path, rank: int, parent: Parent) -> None:
    parent.tell("result", **run_job(json.loads(path.read_text(encoding="utf-8")), rank))


def run_job(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Build one rank of a port and answer the prompts of a job.

    Args:
        job: what `session.answer_on_cpu` writes.
        rank: this rank.

    Returns:
        `answers`, `load_seconds`, and the inference configuration as JSON text in `config`.
    """
    quiet_transformers()
    torch.set_num_threads(max((os.cpu_count() or 1) // job["tp"], 1))
    activate()
    model_class = load_class(parse_class(job["port"]))
    config_class = load_class(parse_class(job["config"])) if job["config"] else model_class.get_config_cls()
    settings = CpuSettings(parse_dtype(job["dtype"]), job["tp"], job["batch"], job["length"], job["options"])
    join_ranks(job["rendezvous"], rank, job["tp"])
    try:
        started = time.perf_counter()
        config = build_config(model_class, config_class, Path(job["model"]), settings)
        application = build_application(model_class, config, Path(job["model"]), rank, job["tp"])
        loading = time.perf_counter() - started
        drive = NxdiCausalModel(
            application,
            batch=settings.batch,
            length=settings.length,
            pad_token=job["pad_token"],
            one_by_one=settings.continuous_batching,
        )
        words: dict[str, Any] = {
            name: frozenset(v) if isinstance(v, list) else v for name, v in job["sampling"].items()
        }
        answers = [answer(drive, prompt, Sampling(**words)).as_dict() for prompt in job["prompts"]]
        return {"answers": answers, "load_seconds": loading, "config": config.to_json_string()}
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
