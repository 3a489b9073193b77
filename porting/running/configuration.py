"""What to compile: the arguments of a compilation, and classes as they are named on a command line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...store.errors import InputError


@dataclass(frozen=True)
class CompilationConfig:
    """Arguments of a compilation; the first five are required.

    Attributes:
        model_class: the port's causal model class.
        config_class: its inference configuration class.
        neuron_config_class: its NeuronConfig class; None for the one that `config_class` names.
        model_path: folder of the Hugging Face checkpoint.
        output_path: folder for what is made.
        batch_size: rows per forward pass.
        seq_len: longest sequence: length of the cache and of the prefill.
        tp_degree: tensor-parallel degree.
        ep_degree: expert-parallel degree.
        use_fp16: true means bfloat16, false float32 (the name is the Autoport skill's).
        reduce_layers: keep this many layers only.
        on_cpu: build and run on this CPU instead of compiling.
        modules_to_capture: `"all"`, a glob, or globs over module paths: tensors that the compiled graph returns.
        capture_inputs: return inputs of those modules too.
        max_intermediate_tensors: slots for tensors that the port registers by itself.
        blockwise_matmul_config: that of experts, as NeuronConfig takes it.
        neuron_options: further arguments of the NeuronConfig.
        compiler_args: further arguments of the compiler, appended to those of every submodel.
        verify_hlo: let the compiler verify the graphs; the library asks for it, this turns it off by default.
    """

    model_class: type
    config_class: type
    neuron_config_class: type | None
    model_path: str | Path
    output_path: str | Path
    batch_size: int = 1
    seq_len: int = 128
    tp_degree: int = 1
    ep_degree: int = 1
    use_fp16: bool = True
    reduce_layers: int | None = None
    on_cpu: bool = False
    modules_to_capture: str | Sequence[str] | None = None
    capture_inputs: bool = True
    max_intermediate_tensors: int | None = 10
    blockwise_matmul_config: Mapping[str, Any] | None = None
    neuron_options: Mapping[str, Any] = field(default_factory=dict)
    compiler_args: str = ""
    verify_hlo: bool = False

    def __post_init__(self) -> None:
        """Check sizes.

        Raises:
            InputError: one is not positive, or the checkpoint is no folder.
        """
        for name in ("batch_size", "seq_len", "tp_degree", "ep_degree"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.reduce_layers is not None and self.reduce_layers < 1:
            raise InputError(f"reduce_layers is {self.reduce_layers}; give 1 or more")
        if not Path(self.model_path).is_dir():
            raise InputError(f"model_path {self.model_path} is no folder; name the Hugging Face checkpoint")

    @property
    def dtype(self) -> str:
        """Name of the dtype."""
        return "bfloat16" if self.use_fp16 else "float32"

    @property
    def capture_globs(self) -> tuple[str, ...]:
        """Globs over the modules to capture; empty for none."""
        if self.modules_to_capture is None:
            return ()
        if isinstance(self.modules_to_capture, str):
            return ("*",) if self.modules_to_capture == "all" else (self.modules_to_capture,)
        return tuple(self.modules_to_capture)


def class_reference(cls: type) -> str:
    """A class as FILE:CLASS, by which another process finds it.

    Raises:
        InputError: it was not defined in a file.
    """
    if cls.__module__.startswith("neuronx_distributed"):
        return f"{cls.__module__}:{cls.__qualname__}"
    try:
        return f"{inspect.getfile(cls)}:{cls.__qualname__}"
    except (OSError, TypeError) as error:
        raise InputError(f"class {cls.__qualname__} comes from no file; define it in the port's file") from error
