"""Predicting a capture of a port: the real model code on tensors without values, ranks that talk to nobody.

`python -m tensorsleuth.capture.nxdi.planning JOB FOLDER` does it in a process of its own: the port's libraries keep
global state. One rank is run; the others record as much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ...porting.environment import find_environment, require_sources
from ...store.errors import InputError, SleuthError
from ...store.index import TensorKey
from ...store.trace import Trace
from ..hf import parse_dtype, quiet_transformers
from ..layout import StepLayout
from ..plan import CountingRecorder, Plan, plan_capture
from ..selection import Selection
from .application import CpuSettings, build_config
from .job import RankJob
from .port import activate, load_class, parse_class
from .recorder import NxdiRecorder
from .run import NxdiCapture, prepare_job

_MODULE = "tensorsleuth.capture.nxdi.planning"


def plan_on_cpu(trace: Trace, capture: NxdiCapture) -> Plan:
    """Predict what `capture_on_cpu` would record, over all ranks; weights are not needed.

    Raises:
        InputError: an argument cannot be used, or the port cannot run on tensors without values.
    """
    require_sources(find_environment())
    if capture.library_capture or capture.options.get("is_continuous_batching"):
        raise InputError("--plan knows neither --library-capture nor continuous batching; leave it out, or --plan")
    with tempfile.TemporaryDirectory(prefix="sleuth-nxdi-plan-") as scratch:
        prepare_job(trace, capture, Path(scratch))
        command = [sys.executable, "-m", _MODULE, str(Path(scratch) / "job.json"), str(trace.path)]
        variables = {**os.environ, "NXD_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{capture.port} cannot be planned without running it: {why}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise InputError(answer["error"])
    return Plan(**answer)


class _NxdiCounter(CountingRecorder, NxdiRecorder):
    """Counts what a rank's recorder would store: its sites, taps and caches included."""

    def __init__(self, model: torch.nn.Module, selection: Selection, job: RankJob) -> None:
        NxdiRecorder.__init__(
            self, model, None, selection, rank=0, tp=job.tp, cache_length=job.length, scores=job.scores
        )
        self._seen: dict[int, torch.Tensor] = {}
        self._job, self._taps = job, ExitStack()

    def attach(self) -> None:
        super().attach()
        self._taps.enter_context(self.taps())

    def detach(self) -> None:
        self._taps.close()
        super().detach()

    @contextmanager
    def step(self, layout: StepLayout) -> Iterator[None]:
        """The layout of the padded tensors, as the adapter of a real run announces it."""
        self.cache_rows = {row.prompt: row.index for row in layout.rows}
        length = self._job.length if layout.phase == "prefill" else 1
        with super().step(replace(layout, batch=self._job.generation.batch_size, length=length)):
            yield

    def _put(self, key: TensorKey, tensor: torch.Tensor) -> None:
        CountingRecorder._put(self, key, tensor)


class _FakeDrive:
    """The model of a port behind `generate.CausalModel`, past the application, which looks at values."""

    def __init__(self, model: torch.nn.Module, job: RankJob) -> None:
        self._model, self._batch, self._length = model, job.generation.batch_size, job.length

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        length = self._length if cache is None else 1
        ids = torch.zeros(self._batch, length, dtype=torch.int64)
        mask = torch.ones(self._batch, self._length, dtype=torch.int64)
        positions = torch.arange(length)[None].expand(self._batch, -1)
        sampling = torch.ones(self._batch, 3)
        output = self._model(ids, mask, positions, torch.arange(self._batch), sampling)
        return output[0], True


def main(arguments: list[str]) -> int:
    """Plan the job in a file; prints the plan, or what is wrong with the job, as JSON."""
    job, folder = RankJob.read(Path(arguments[0])), Path(arguments[1])
    try:
        answer = _plan(job, folder).as_dict()
    except SleuthError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    return 0


def _plan(job: RankJob, folder: Path) -> Plan:
    quiet_transformers()
    activate()
    os.environ["NXD_CPU_MODE"] = "1"
    port = load_class(parse_class(job.port))
    config_class = load_class(parse_class(job.config)) if job.config else port.get_config_cls()
    dtype = parse_dtype(job.dtype)
    settings = CpuSettings(dtype, job.tp, job.generation.batch_size, job.length, job.options)
    if settings.continuous_batching:
        raise InputError("--plan does not know continuous batching, which sequence parallelism needs; plan without it")
    config = build_config(port, config_class, Path(job.model), settings)
    _join_nobody(job.tp)

    def build() -> tuple[torch.nn.Module, _FakeDrive]:
        model = port(job.model, config).models[0].model_cls(config).eval()
        _convert(model, dtype)
        drive = _FakeDrive(model, job)
        drive(torch.zeros(1, 1), None, torch.zeros(1, 1), None)  # some buffers are made by the first forward pass
        return model, drive

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_capture(
            build, job.prompts, job.generation, job.selection, folder=folder, dtype=dtype,
            statistics_only=job.statistics_only, counting=lambda model, keep: _NxdiCounter(model, keep, job),
        )  # fmt: skip
    tp = job.tp
    return Plan(plan.n_tensors * tp, plan.nbytes * tp, plan.stored_nbytes * tp, plan.flops * tp, plan.seconds * tp)


def _join_nobody(tp: int) -> None:
    """Rank 0 of a group whose collectives return at once."""
    from neuronx_distributed.parallel_layers.parallel_state import initialize_model_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    new_group = torch.distributed.new_group

    def fake_group(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **{**options, "backend": "fake"})

    with patch("torch.distributed.new_group", fake_group):
        initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=1,
            expert_model_parallel_size=1,
            skip_collective_init=True,
        )


def _convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give floating-point weights a dtype; `Module.to` cannot exchange tensors without values."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_floating_point():
                module._parameters[name] = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
