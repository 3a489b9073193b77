"""Does the parity check notice every single wrong fact, and does it name the module where the fact acts?

Each architecture's spec is changed in one fact at a time, its port generated and run beside the model: FP32 logits of a
prefill and eight decode steps must leave the tolerance, or the port must fail to run. With `--modules`, the whole gate
judges (FP32, one rank, two prompts), and the first divergent module that it names must be one where the fact shows
first (`porting/parity/first_modules.py`). Needs the sources of NxD Inference (NXDI_SRC, NXD_SRC).

    python benchmarks/port_mutations.py [--model TYPE ...] [--modules] [--all]

One line per fact that goes unnoticed or is misnamed (with `--all` per fact), and one per architecture.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorsleuth.capture.hf import quiet_transformers
from tensorsleuth.porting.environment import find_environment, require_sources
from tensorsleuth.porting.generator.generate import generate, write_port
from tensorsleuth.porting.parity.direct import logit_errors
from tensorsleuth.porting.parity.first_modules import first_modules, shows_at
from tensorsleuth.porting.parity.gate import TOLERANCE, ParityGate, Setting
from tensorsleuth.porting.parity.mutation import Mutant, mutants
from tensorsleuth.porting.spec.architecture import Architecture
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.porting.spec.hostile import hostile_model
from tensorsleuth.store import InputError, SleuthError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_PROMPTS = (12, 19)
DEFAULT = ("qwen3", "gemma2", "granite", "gpt_neox", "cohere2", "olmo2", "qwen2_moe", "deepseek_v3")


@dataclass(frozen=True)
class Outcome:
    """What a check says of a wrong port: whether it is noticed, whether the module is named (None: not asked), how."""

    noticed: bool
    named: bool | None
    how: str


class ByLogits:
    """Judges by logits, in this process."""

    def __init__(self, spec: Architecture, config: Any, folder: Path) -> None:
        """Build the model."""
        self._model, self._spec = hostile_model(config), spec

    def __call__(self, mutant: Mutant, port: str, folder: Path) -> Outcome:
        """Run the port beside the model."""
        try:
            error = logit_errors(self._model, port, self._spec).worst
        finally:
            sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(folder))]
            for module in [module for module in sys.modules if module.startswith("modeling_")]:
                del sys.modules[module]
        return Outcome(not error <= TOLERANCE, None, f"logits off by {error:.1e}")


class ByModules:
    """Judges by the gate."""

    def __init__(self, spec: Architecture, config: Any, folder: Path) -> None:
        """Capture the reference."""
        self._gate, self._spec, self._count = ParityGate(spec, config, folder / "gate", prompts=_PROMPTS), spec, 0

    def __call__(self, mutant: Mutant, port: str, folder: Path) -> Outcome:
        """Send the port through the gate."""
        self._count += 1
        check = self._gate.check(port, Setting("float32", 1), f"mutant-{self._count}")
        if not check.n_sites:
            return Outcome(True, None, f"does not run ({check.reasons[0][:100]})")
        module = check.first_divergent.partition(" ")[0].partition("[")[0]
        named = shows_at(self._spec, mutant.field, module)
        expected = "" if named else f", not {' or '.join(first_modules(self._spec, mutant.field))}"
        return Outcome(check.verdict == "fail", named, f"diverges at {check.first_divergent}{expected}")


def outcome(judge: ByLogits | ByModules, mutant: Mutant, folder: Path) -> Outcome:
    """Whether a wrong port is noticed, and how."""
    try:
        port = generate(mutant.spec)
        return judge(mutant, f"{write_port(port, folder)}:{port.class_name}", folder)
    except (SleuthError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, NameError) as failure:
        return Outcome(True, None, f"does not run ({type(failure).__name__})")


def check(name: str, folder: Path, *, modules: bool, show_all: bool) -> list[Outcome]:
    """What is said of an architecture's mutants."""
    config = CONFIG_MAPPING[name]().get_text_config()
    spec = analyse_config(config)
    judge = (ByModules if modules else ByLogits)(spec, config, folder / name)
    outcomes = []
    for number, mutant in enumerate(mutants(spec)):
        found = outcome(judge, mutant, folder / f"{name}-{number}")
        outcomes.append(found)
        if show_all or not found.noticed or found.named is False:
            word = "UNNOTICED" if not found.noticed else "MISNAMED" if found.named is False else "noticed"
            print(f"    {word:9} {mutant.field}: {mutant.change}; {found.how}", flush=True)
    return outcomes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="model type of transformers")
    parser.add_argument("--modules", action="store_true", help="ask the gate for the module as well")
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
            outcomes = check(name, Path(scratch), modules=arguments.modules, show_all=arguments.all)
            noticed = sum(found.noticed for found in outcomes)
            asked = [found.named for found in outcomes if found.named is not None]
            right &= noticed == len(outcomes) and all(asked)
            refused = sum(found.how.startswith("does not run") for found in outcomes)
            line = f"{name:14} {noticed} of {len(outcomes)} wrong facts noticed ({refused} ports do not run)"
            print(f"{line}; {sum(asked)} of {len(asked)} modules named" if asked else line, flush=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
