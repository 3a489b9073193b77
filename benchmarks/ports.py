"""Every architecture through the parity gate: is the generated port right, and what did it need?

Ports are generated from configurations of transformers, and checked on small hostile checkpoints: FP32 and BF16,
prefill and eight decode steps, one and two ranks. Needs the sources of NxD Inference (NXDI_SRC, NXD_SRC).

    python benchmarks/ports.py [--model NAME ...] [--quick] [--keep FOLDER]

One line per architecture: verdict of each setting (FP32 and BF16 on one rank, then on two), the largest FP32 error
and the largest R of the logits over prefill and decode and all settings, sites compared, seconds to analyse and
generate, lines of the port, and the facts that the library has no module for. `--quick` computes FP32 logits on one
rank only, in this process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from port_configurations import CONFIGURATIONS, configuration
from tensorsleuth.capture.hf import quiet_transformers
from tensorsleuth.porting.environment import find_environment, require_sources
from tensorsleuth.porting.generator.custom import custom_parts
from tensorsleuth.porting.generator.generate import generate, write_port
from tensorsleuth.porting.parity.direct import logit_errors
from tensorsleuth.porting.parity.gate import FULL, TOLERANCE, check_model
from tensorsleuth.porting.spec.extract import analyse
from tensorsleuth.porting.spec.hostile import hostile_model
from tensorsleuth.store import InputError, SleuthError

HEADER = " ".join(
    (
        f"{'architecture':20} {'verdicts':23} {'FP32 error':>10} {'BF16 R':>7} {'sites':>5}",
        f"{'gen s':>6} {'lines':>5} custom code",
    )
)


def through_the_gate(name: str, folder: Path) -> bool:
    """Print an architecture's line; whether all settings pass."""
    configuration(name).save_pretrained(folder / "model")
    try:
        report = check_model(folder / "model", folder, FULL)
    except SleuthError as error:
        print(f"{name:20} {error}", flush=True)
        return False
    verdicts = ",".join(check.verdict for check in report.checks)
    errors = [c.logits_error for c in report.checks if c.setting.dtype == "float32" and c.logits_error is not None]
    ratios = [c.logits_ratio for c in report.checks if c.logits_ratio is not None]
    lines = len(report.port_file.read_text().splitlines())
    print(
        f"{name:20} {verdicts:23} {max(errors, default=float('nan')):10.1e} {max(ratios, default=float('nan')):7.3f} "
        f"{report.checks[0].n_sites:5} {report.seconds_to_generate:6.1f} {lines:5} "
        f"{', '.join(custom_parts(report.architecture)) or '-'}",
        flush=True,
    )
    for check in report.checks:
        for reason in check.reasons:
            print(f"    {check.setting.run}: {reason}; {check.first_divergent}", file=sys.stderr)
    return report.verdict == "pass"


def logits_only(name: str, folder: Path) -> bool:
    """Print an architecture's line from FP32 logits on one rank; whether they agree."""
    config = configuration(name)
    started = time.perf_counter()
    try:
        architecture = analyse(config)
        port = generate(architecture)
        seconds = time.perf_counter() - started
        file = write_port(port, folder)
        file = file.rename(file.with_name(f"port_{name.replace('-', '_')}.py"))
        errors = logit_errors(hostile_model(config), f"{file}:{port.class_name}", architecture)
    except InputError as error:
        print(f"{name:20} {error}", flush=True)
        return False
    verdict = "pass" if errors.worst <= TOLERANCE else "fail"
    print(
        f"{name:20} {verdict:23} {errors.worst:10.1e} {'-':>7} {'-':>5} {seconds:6.1f} "
        f"{len(file.read_text().splitlines()):5} {', '.join(custom_parts(architecture)) or '-'}",
        flush=True,
    )
    return verdict == "pass"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(CONFIGURATIONS))
    parser.add_argument("--quick", action="store_true", help="FP32 logits on one rank only")
    parser.add_argument("--keep", type=Path, help="folder for ports and traces; deleted afterwards by default")
    arguments = parser.parse_args()
    try:
        require_sources(find_environment())
    except InputError as error:
        print(f"skipped: {error}")
        return
    warnings.simplefilter("ignore")
    quiet_transformers()
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    names = arguments.model or list(CONFIGURATIONS)
    one = logits_only if arguments.quick else through_the_gate
    with tempfile.TemporaryDirectory(prefix="ports-") as scratch:
        right = [one(name, (arguments.keep or Path(scratch)) / name) for name in names]
    print(f"{sum(right)} of {len(right)} architectures pass")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
