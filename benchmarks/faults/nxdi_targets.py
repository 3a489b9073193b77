"""Bugs in ports of NxD Inference, on the CPU: its own classes on broken checkpoints and configurations.

Ports are seldom wrong in the library's code and often in what they feed it: weights converted wrongly, a key of the
configuration lost. So a bug of the benchmark that changes weights is planted in the checkpoint, and one that a key
decides in the configuration; the library's unmodified class runs on one rank or on two.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorsleuth.capture.nxdi.run import NxdiCapture, capture_on_cpu
from tensorsleuth.porting.environment import find_environment, require_sources
from tensorsleuth.store import InputError

from .bench import REFERENCE, TARGET, Bench, Report, analyse
from .fault import Fault, Severity

PORTS = {
    name: f"neuronx_distributed_inference.models.{name}.modeling_{name}:Neuron{cls}ForCausalLM"
    for name, cls in (("llama", "Llama"), ("qwen3", "Qwen3"), ("mixtral", "Mixtral"))
}
#: Numbers of ranks that they run on.
RANKS = {"llama": (1, 2), "qwen3": (2,), "mixtral": (2,)}
#: Bugs that change weights alone.
IN_WEIGHTS = (
    "embedding-shard",
    "vocabulary-order",
    "norm-gain-lost",
    "norm-gain-of-next-layer",
    "qk-norms-swapped",
    "qkv-bias",
    "value-bias-missing",
    "weight-transposed",
    "weight-transposed-output",
    "weight-permuted",
    "weight-of-next-layer",
    "layers-swapped",
    "rank-zero-qkv",
    "rank-zero-up",
    "weights-quantised",
    "gate-up-swapped",
    "expert-gate-up-swapped",
)
Config = dict[str, Any]


def _rope_base(config: Config, factor: Severity) -> None:
    config["rope_theta"] *= factor


def _rope_scaling(config: Config, _: Severity) -> None:
    config["rope_scaling"] = None


def _activation(config: Config, kind: Severity) -> None:
    config["hidden_act"] = kind


def _epsilon(config: Config, factor: Severity) -> None:
    config["rms_norm_eps"] *= factor


def _experts(change: int) -> Callable[[Config, Severity], None]:
    def edit(config: Config, _: Severity) -> None:
        config["num_experts_per_tok"] += change

    return edit


#: Bugs that a key of the configuration decides.
IN_CONFIG: dict[str, Callable[[Config, Severity], None]] = {
    "rope-base": _rope_base,
    "rope-scaling": _rope_scaling,
    "activation": _activation,
    "norm-epsilon": _epsilon,
    "routing-fewer": _experts(-1),
    "routing-more": _experts(1),
}
#: Activations that the library knows by the names of transformers.
_UNKNOWN = frozenset({("activation", "quick_gelu")})
#: Architectures of which checkpoints hold no weight of lm_head: it is the embedding's.
_TIED = frozenset({"qwen3"})


def why_not() -> str:
    """Why ports of NxD Inference cannot run here; empty when they can."""
    try:
        require_sources(find_environment())
    except InputError as error:
        return str(error)
    return ""


def can_be_planted(fault: Fault, severity: Severity, architecture: str) -> bool:
    """Whether a bug can be planted in a checkpoint of the architecture."""
    known = fault.name in IN_WEIGHTS or fault.name in IN_CONFIG
    if fault.name == "vocabulary-order" and architecture in _TIED:
        return False
    return known and architecture in PORTS and (fault.name, severity) not in _UNKNOWN


def examine(bench: Bench, fault: Fault | None, severity: Severity, ranks: int, name: str) -> Report:
    """Record NxD Inference's port on a broken checkpoint (an intact one without a fault), and analyse it."""
    trace = bench.copy(bench.folder(name))
    checkpoint = bench.settings.scratch / "checkpoints" / f"{bench.name}-{name}"
    _break(bench, fault, severity, checkpoint)
    started = time.perf_counter()
    try:
        capture_on_cpu(
            trace,
            NxdiCapture(
                checkpoint,
                PORTS[bench.name],
                TARGET,
                "target",
                dtype="bfloat16",
                tp=ranks,
                teacher=REFERENCE,
                generation=bench.generation,
                selection=bench.selection,
            ),
        )
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return analyse(trace, {"capture": time.perf_counter() - started}, bench.settings.replicates)


def _break(bench: Bench, fault: Fault | None, severity: Severity, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if fault is None or fault.name in IN_CONFIG:
        shutil.copytree(bench.checkpoint.folder, folder)
        if fault is not None:
            file = folder / "config.json"
            config = json.loads(file.read_text())
            IN_CONFIG[fault.name](config, severity)
            file.write_text(json.dumps(config))
        return
    model = bench.checkpoint.model(torch.bfloat16)
    fault.plant(model, severity)
    model.save_pretrained(folder, state_dict={name: value.clone() for name, value in model.state_dict().items()})
