"""A port that answers prompts: on this CPU, one process per rank, or loaded onto a Neuron device."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...capture.nxdi.ranks import RankGroup, last_words
from ...store.errors import CaptureError, InputError
from ..environment import find_environment, require_sources
from .sampling import Answer, Sampling, answer

_WORKER = "tensorsleuth.porting.running.worker"
#: Lengths of cache and prefill are a multiple of this, so that no device kernel is chosen by accident.
_STEP = 64


@dataclass(frozen=True)
class CpuPort:
    """A port to run on a CPU.

    Attributes:
        model: folder of the checkpoint.
        port: the causal model class as FILE:CLASS.
        config: its configuration class as FILE:CLASS; empty for the one it names.
        dtype: dtype by name.
        tp: number of ranks.
        batch: rows per forward pass.
        length: length of cache and prefill.
        options: further arguments of the NeuronConfig.
        pad_token: token id at padding.
    """

    model: Path
    port: str
    config: str = ""
    dtype: str = "bfloat16"
    tp: int = 1
    batch: int = 1
    length: int = _STEP
    options: Mapping[str, Any] = field(default_factory=dict)
    pad_token: int = 0


@dataclass(frozen=True)
class Answers:
    """Answers to prompts.

    Attributes:
        answers: one per prompt.
        load_seconds: time to build the port and load its weights.
        config: the inference configuration as JSON text.
    """

    answers: tuple[Answer, ...]
    load_seconds: float
    config: str


def answer_on_cpu(port: CpuPort, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Answers:
    """Answer prompts with a port on this CPU; every weight is accounted for.

    Raises:
        InputError: the port, an option or the checkpoint cannot be used.
        CaptureError: a rank died.
    """
    require_sources(find_environment())
    with tempfile.TemporaryDirectory(prefix="sleuth-port-") as scratch:
        folder = Path(scratch)
        job = {
            **dataclasses.asdict(port),
            "model": str(port.model.resolve()),
            "rendezvous": str(folder / "rendezvous"),
            "prompts": [list(prompt) for prompt in prompts],
            "sampling": {
                **dataclasses.asdict(sampling),
                "stop": sorted(sampling.stop),
                "suppressed": sorted(sampling.suppressed),
            },
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        results, errors = _run_ranks(folder, port.tp)
    if errors:
        first = errors[min(errors)]
        kind = InputError if first["expected"] else CaptureError
        raise kind(first["message"] if first["expected"] else f"rank {min(errors)} failed: {first['message']}")
    body = results[0]
    answers = tuple(Answer(**{**one, "tokens": tuple(one["tokens"])}) for one in body["answers"])
    return Answers(answers, body["load_seconds"], body["config"])


def _run_ranks(folder: Path, tp: int) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    results: dict[int, dict[str, Any]] = {}
    errors: dict[int, dict[str, Any]] = {}

    def on_event(rank: int, event: dict[str, Any]) -> None:
        (results if event["kind"] == "result" else errors)[rank] = event

    command = [sys.executable, "-m", _WORKER, str(folder / "job.json")]
    variables = {"NXD_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    with RankGroup(command, tp, folder, variables) as group:
        codes = group.run(on_event)
        words = {rank.number: last_words(rank.log) for rank in group.ranks}
    for rank, code in enumerate(codes):
        if code and rank not in errors and not any(item["expected"] for item in errors.values()):
            errors[rank] = {"message": words[rank] or f"ended with exit code {code}", "expected": False}
    return results, errors


class DevicePort:
    """A compiled port, loaded onto the Neuron device of this machine.

    None of this has run on a device; up to the call that needs one, the tests run it.
    """

    def __init__(self, port: str, compiled: Path, *, pad_token: int = 0) -> None:
        """Load it.

        Raises:
            InputError: there is no Neuron SDK, no device, or no compiled port in the folder.
        """
        from ...capture.nxdi.adapter import NxdiCausalModel
        from ...capture.nxdi.device_run import require_device
        from ...capture.nxdi.port import activate, load_class, parse_class

        found = find_environment()
        require_sources(found)
        require_device(found, compiled)
        activate(found)
        started = time.perf_counter()
        self.application = load_class(parse_class(port))(str(compiled))
        self.application.load(str(compiled))
        self.load_seconds = time.perf_counter() - started
        neuron = self.application.neuron_config
        self.model = NxdiCausalModel(
            self.application,
            batch=int(neuron.batch_size),
            length=int(neuron.max_context_length),
            pad_token=pad_token,
            one_by_one=bool(neuron.is_continuous_batching),
        )

    def save_captures(self, folder: str | Path | None, indices: Sequence[int] | None) -> None:
        """Save the tensors that the compiled graph returns, of some steps or all, as the library does.

        Raises:
            InputError: no folder is given, or nothing was compiled in.
        """
        from neuronx_distributed_inference.utils.tensor_capture_utils import get_tensor_capture_hook

        from ...capture.nxdi.device_run import compiled_pass

        if folder is None:
            raise InputError("tensor_capture_output_dir says where captured tensors go; give it")
        compiled_pass(self.application.neuron_config)
        hook = get_tensor_capture_hook(
            capture_indices=None if indices is None else list(indices), tensor_capture_save_dir=str(folder)
        )
        self.model.options = {**self.model.options, "tensor_capture_hook": hook}

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Answers:
        """Answer prompts."""
        answers = tuple(answer(self.model, prompt, sampling) for prompt in prompts)
        return Answers(answers, self.load_seconds, self.application.config.to_json_string())


def length_for(prompts: Sequence[Sequence[int]], new_tokens: int, least: int = 0) -> int:
    """A length of cache and prefill that holds prompts and answers."""
    longest = max((len(prompt) for prompt in prompts), default=1) + new_tokens
    return -(-max(longest, least) // _STEP) * _STEP
