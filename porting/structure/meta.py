"""Models on the meta device: names, shapes and attributes are real, there are no values."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...capture.hf import ModelSource, load_config
from ...capture.nxdi.application import CpuSettings, build_config
from ...capture.nxdi.port import activate, load_class, parse_class
from ...store.errors import InputError

#: Length of cache and prefill of a port that is built to be looked at.
_LENGTH = 64


class OnMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, tensors are made on the meta device, whatever device is asked for."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchDispatchMode`."""
        words = dict(kwargs or {})
        if words.get("device") is not None:
            words["device"] = torch.device("meta")
        return func(*args, **words)


def source_on_meta(folder: Path) -> torch.nn.Module:
    """A Hugging Face causal model without weights.

    Raises:
        InputError: the folder holds no configuration that transformers knows.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(ModelSource(folder))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, with model-parallel groups, while a port is built."""
    from neuronx_distributed.parallel_layers import parallel_state

    own_group = not torch.distributed.is_initialized()
    own_parallel = not parallel_state.model_parallel_is_initialized()
    with tempfile.TemporaryDirectory(prefix="sleuth-meta-") as scratch:
        if own_group:
            rendezvous = f"file://{scratch}/rendezvous"
            torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        if own_parallel:
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, skip_collective_init=True)
        try:
            yield
        finally:
            if own_parallel:
                parallel_state.destroy_model_parallel()
            if own_group:
                torch.distributed.destroy_process_group()


def port_classes(port: str, config: str = "") -> tuple[Any, Any]:
    """The causal model class of a port and its configuration class; runs the port file.

    Args:
        port: the causal model class as FILE:CLASS.
        config: its configuration class as FILE:CLASS; the one that the port names by default.

    Raises:
        InputError: the sources of NxD Inference or a class cannot be found.
    """
    activate()
    model_class = load_class(parse_class(port))
    if config:
        return model_class, load_class(parse_class(config))
    try:
        return model_class, model_class.get_config_cls()
    except (NotImplementedError, AttributeError) as error:
        raise InputError(f"{port} names no configuration class; give --config FILE:CLASS") from error
    except Exception as error:
        raise InputError(f"get_config_cls of {port} fails: {type(error).__name__}: {error}") from error


def port_config(
    model_class: Any,
    config_class: Any,
    folder: Path,
    options: Mapping[str, Any] | None = None,
    *,
    length: int = _LENGTH,
) -> Any:
    """A port's configuration for one rank of a CPU.

    Raises:
        InputError: the checkpoint's configuration does not fit the port.
    """
    settings = CpuSettings(torch.bfloat16, 1, 1, length, dict(options or {}))
    return build_config(model_class, config_class, folder, settings)


def model_on_meta(model_class: Any, configuration: Any) -> torch.nn.Module:
    """The model of a causal model class, inside `one_rank`."""
    os.environ["NXD_CPU_MODE"] = "1"
    with warnings.catch_warnings(), OnMeta(), torch.device("meta"):  # type: ignore[no-untyped-call]
        warnings.simplefilter("ignore")
        model: torch.nn.Module = model_class._model_cls(configuration)
    return model.eval()


def target_on_meta(
    port: str, folder: Path, *, config: str = "", options: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """A port's model for one rank, in CPU mode, without weights.

    Args:
        port: the causal model class as FILE:CLASS.
        folder: the Hugging Face checkpoint, of which the configuration is read.
        config: the configuration class as FILE:CLASS; the one that the port names by default.
        options: further arguments of its NeuronConfig.

    Raises:
        InputError: the port cannot be built; the message says why.
    """
    model_class, config_class = port_classes(port, config)
    configuration = port_config(model_class, config_class, folder, options)
    with one_rank():
        try:
            return model_on_meta(model_class, configuration)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(f"the model of {port} cannot be built: {reason}") from error
