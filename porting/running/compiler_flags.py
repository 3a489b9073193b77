"""Environment and arguments of a compilation, and which of them reach the compiler.

NxD Inference gives every submodel its own compiler arguments and passes those; the variable NEURON_CC_FLAGS is not
among them, so that what it says about verification is overruled by the library's own `--verify-hlo=true`. Arguments are
therefore changed where they are passed, in the submodels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .configuration import CompilationConfig

_VERIFY, _NO_VERIFY = "--verify-hlo=true", "--verify-hlo=false"
_MOE_FLAG = "--enable-internal-neff-wrapper"


def environment(config: CompilationConfig, *, experts: bool, work_folder: Path) -> dict[str, str]:
    """Variables of a compilation: those of the Autoport skill's compiler.

    Args:
        config: what is compiled.
        experts: whether the port has experts.
        work_folder: where intermediate artifacts go.
    """
    flags = "--internal-hlo2tensorizer-options=--verify-hlo=false"
    if experts:
        flags = (
            "--model-type=transformer -O1 --internal-hlo2tensorizer-options='--modular-flow-mac-threshold=10 "
            f"--verify-hlo=false' {_MOE_FLAG}"
        )
    return {
        "XLA_IR_DEBUG": "1",
        "XLA_HLO_DEBUG": "1",
        "XLA_FALLBACK_CPU": "0",
        "NEURON_RT_LOG_LEVEL": "INFO",
        "NEURON_FUSE_SOFTMAX": "1",
        "NEURON_DUMP_HLO_SNAPSHOT": "1",
        "NEURON_FRAMEWORK_DEBUG": "1",
        "BASE_COMPILE_WORK_DIR": str(work_folder),
        "NEURON_CC_FLAGS": " ".join((flags, config.compiler_args)).strip(),
    }


@contextmanager
def set_for_now(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put the old ones back."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def apply_flags(application: Any, config: CompilationConfig, *, experts: bool) -> dict[str, str]:
    """Change the arguments that every submodel passes to the compiler.

    Args:
        application: the port's causal model.
        config: what is compiled.
        experts: whether it has experts.

    Returns:
        The arguments by submodel, as they are passed.
    """
    for wrapper in application.models:
        words = wrapper.compiler_args or ""
        if not config.verify_hlo:
            words = words.replace(_VERIFY, _NO_VERIFY)
        if experts and _MOE_FLAG not in words:
            words = f"{words} {_MOE_FLAG}"
        if config.compiler_args:
            words = f"{words} {config.compiler_args}"
        wrapper.compiler_args = " ".join(words.split())
    return {wrapper.tag: wrapper.compiler_args for wrapper in application.models}
