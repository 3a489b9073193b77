"""Does the parity check notice every single wrong fact?

Each architecture's spec is changed in one fact at a time, its port generated and run beside the model: FP32 logits of a
prefill and eight decode steps must leave the tolerance, or the port must fail to run. Needs the sources of NxD
Inference (NXDI_SRC, NXD_SRC).

    python benchmarks/port_mutations.py [--model TYPE ...] [--all]

One line per fact that goes unnoticed (with `--all` per fact), and one per architecture.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from tensorsleuth.capture.hf import quiet_transformers
from tensorsleuth.porting.environment import find_environment, require_sources
from tensorsleuth.porting.generator.generate import generate, write_port
from tensorsleuth.porting.parity.direct import logit_errors
from tensorsleuth.porting.parity.gate import TOLERANCE
from tensorsleuth.porting.parity.mutation import Mutant, mutants
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.porting.spec.hostile import hostile_model
from tensorsleuth.store import InputError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DEFAULT = ("qwen3", "gemma2", "granite", "gpt_neox", "cohere2", "olmo2", "qwen2_moe", "deepseek_v3")


def outcome(model: torch.nn.Module, mutant: Mutant, folder: Path) -> tuple[bool, str]:
    """Whether a wrong port is noticed, and how."""
    try:
        port = generate(mutant.spec)
        file = write_port(port, folder)
        error = logit_errors(model, f"{file}:{port.class_name}").worst
    except (InputError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, NameError) as failure:
        return True, f"does not run ({type(failure).__name__})"
    return not error <= TOLERANCE, f"logits off by {error:.1e}"


def check(name: str, folder: Path, *, show_all: bool) -> tuple[int, int]:
    """Noticed and all mutants of an architecture."""
    config = CONFIG_MAPPING[name]().get_text_config()
    model = hostile_model(config)
    noticed = total = 0
    for number, mutant in enumerate(mutants(analyse_config(config))):
        found, how = outcome(model, mutant, folder / f"{name}-{number}")
        sys.path = [entry for entry in sys.path if not entry.startswith(str(folder))]
        for module in [module for module in sys.modules if module.startswith("modeling_")]:
            del sys.modules[module]
        noticed += found
        total += 1
        if show_all or not found:
            print(f"    {'noticed' if found else 'UNNOTICED':9} {mutant.field}: {mutant.change}; {how}", flush=True)
    return noticed, total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="model type of transformers")
    parser.add_argument("--all", action="store_true", help="print every fact")
    arguments = parser.parse_args()
    try:
        require_sources(find_environment())
    except InputError as error:
        print(f"skipped: {error}")
        return
    warnings.simplefilter("ignore")
    quiet_transformers()
    torch.set_num_threads(1)
    right = True
    with tempfile.TemporaryDirectory(prefix="port-mutations-") as scratch:
        for name in arguments.model or DEFAULT:
            noticed, total = check(name, Path(scratch), show_all=arguments.all)
            right &= noticed == total
            print(f"{name:14} {noticed} of {total} wrong facts noticed", flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
