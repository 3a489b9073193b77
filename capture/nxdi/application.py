"""Building an NxD Inference application on a CPU, with every weight accounted for.

The library's own CPU entry refuses BF16 on several ranks and drops the list of weights that it could not load. This
module builds the model the same way and keeps both.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...store.errors import InputError

#: Caches are part of the module tree, not of a checkpoint.
_NOT_IN_CHECKPOINTS = "kv_mgr."
_RANK_NUMBER = ("spmd_rank.rank", "rank_util.rank")
_LISTED = 8


@dataclass(frozen=True)
class CpuSettings:
    """How a port is configured for a CPU.

    Attributes:
        dtype: the model's dtype.
        tp: tensor-parallel degree.
        batch: rows per forward pass.
        length: length of the KV cache and of the prefill bucket.
        options: further arguments of the port's NeuronConfig, for example `fused_qkv`.
    """

    dtype: torch.dtype
    tp: int
    batch: int
    length: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequence_parallel(self) -> bool:
        """Whether prefill splits positions over ranks."""
        return bool(self.options.get("sequence_parallel_enabled"))

    @property
    def continuous_batching(self) -> bool:
        """Whether prompts are prefilled one by one."""
        return bool(self.options.get("is_continuous_batching")) or self.sequence_parallel


def build_config(model_class: Any, config_class: Any, path: Path, settings: CpuSettings) -> Any:
    """The port's inference configuration for a CPU.

    Raises:
        InputError: the checkpoint's configuration or an option does not fit the port.
    """
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    neuron_class = config_class.get_neuron_config_cls()
    arguments: dict[str, Any] = {
        "tp_degree": settings.tp,
        "batch_size": settings.batch,
        "max_context_length": settings.length,
        "seq_len": settings.length,
        "torch_dtype": settings.dtype,
        "on_cpu": True,
        "attn_kernel_enabled": False,
    }
    if settings.continuous_batching:
        arguments.update(is_continuous_batching=True, ctx_batch_size=1, tkg_batch_size=settings.batch)
    arguments.update(settings.options)
    try:
        neuron_config = neuron_class(**arguments)
        return config_class(neuron_config, load_config=load_pretrained_config(str(path)))
    except (TypeError, ValueError, AssertionError, OSError, KeyError, AttributeError) as error:
        raise InputError(
            f"{config_class.__name__} cannot be made for {path}: {type(error).__name__}: {error}"
        ) from error


def build_application(model_class: Any, config: Any, path: Path, rank: int, tp: int) -> Any:
    """The application with its weights, inside an initialised process group.

    Raises:
        InputError: weights are missing from the checkpoint, or the model has no place for some.
    """
    from neuronx_distributed.parallel_layers.parallel_state import initialize_model_parallel

    os.environ["NXD_CPU_MODE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=1,
            expert_model_parallel_size=getattr(config.neuron_config, "ep_degree", 1),
            skip_collective_init=True,
        )
        application = model_class(str(path), config)
        for part in parts_of(application):
            separate = bool(config.neuron_config.is_continuous_batching)
            built: torch.nn.Module | None = None
            for wrapper in part.models:
                if built is None or separate:
                    built = _build_model(part, wrapper.model_cls, wrapper.config if separate else config, rank, tp)
                wrapper.model = built
    return application.eval()


def parts_of(application: Any) -> list[Any]:
    """The applications that one consists of: encoder and decoder where they are two, else itself."""
    if hasattr(application, "models"):
        return [application]
    return [child for child in application.children() if hasattr(child, "models")]


def _build_model(application: Any, model_class: Any, config: Any, rank: int, tp: int) -> torch.nn.Module:
    from neuronx_distributed.trace import trace

    dtype = config.neuron_config.torch_dtype
    model: torch.nn.Module = model_class(config)
    if dtype is not torch.float32:
        model = model.to(dtype)
    try:
        state = application.checkpoint_loader_fn()
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"the port's conversion of the checkpoint failed: {type(error).__name__}: {error}; a weight it expects "
            "is missing, or has another shape"
        ) from error
    state = _ReadWeights(trace.check_for_duplicate_tensors(state, False) or state)
    try:
        trace.invoke_preshard_hook(model, state, "")
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"weights cannot be split over ranks: {type(error).__name__}: {error}; a projection's weight "
            "or bias is missing from the converted checkpoint"
        ) from error
    expected = model.state_dict()
    _add_rank_numbers(expected, state, tp)
    surplus = {
        name for name in set(state) - set(expected) if name in state.read or _is_accounted_for(name, state, expected)
    }
    check_keys(set(expected) - loaded_by_another_name(expected, state), set(state) - surplus, model_class.__name__)
    trace.get_sharded_checkpoint(state, model, rank, tp, is_cached=True)
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"weights do not fit {model_class.__name__}: {' '.join(str(error).split())}") from error
    return model


def _add_rank_numbers(expected: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor], tp: int) -> None:
    """Ranks are counted, not learned: ports that leave them out (the library's own do) get them."""
    for name in expected:
        if name.endswith(_RANK_NUMBER) and not name.startswith(_NOT_IN_CHECKPOINTS) and name not in state:
            state[name] = torch.arange(tp, dtype=torch.int32)


def _is_accounted_for(name: str, state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether a surplus weight is a rank number, or was copied to a name that the model has."""
    if name.endswith(_RANK_NUMBER):
        return True
    scope = name.rpartition(".")[0].rpartition(".")[0]
    weight = state[name]
    return any(
        other.startswith(scope) and state[other].shape == weight.shape and torch.equal(state[other], weight)
        for other in expected
        if other in state
    )


def loaded_by_another_name(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that the checkpoint lacks, of weights that it has under another: one module used in two places."""
    held = {_storage(weight) for name, weight in expected.items() if name in state and weight.numel()}
    return {name for name, weight in expected.items() if name not in state and _storage(weight) in held}


def _storage(weight: torch.Tensor) -> tuple[int, torch.Size]:
    return weight.data_ptr(), weight.shape


class _ReadWeights(dict[str, torch.Tensor]):
    """A checkpoint that remembers which weights were read: projections copy theirs to another name."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(weights)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def check_keys(expected: set[str], found: set[str], model: str) -> None:
    """Compare the names a model expects with those of its converted checkpoint.

    Raises:
        InputError: listing missing and unexpected names; only caches may be missing.
    """
    missing = sorted(name for name in expected - found if not name.startswith(_NOT_IN_CHECKPOINTS))
    unexpected = sorted(found - expected)
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise InputError(
            f"the converted checkpoint does not fit {model}: {'; '.join(parts)}; correct the port's "
            "convert_hf_to_neuron_state_dict, or the model folder"
        )
