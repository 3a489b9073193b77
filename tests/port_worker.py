"""Logit errors of ports, all architectures in one process: `python port_worker.py FOLDER NAME...` prints JSON.

The stand-in for the Neuron SDK stays out of the process that runs the tests.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from port_configurations import configuration
from tensorsleuth.capture.hf import quiet_transformers
from tensorsleuth.porting.generator.generate import generate, write_port
from tensorsleuth.porting.parity.direct import logit_errors
from tensorsleuth.porting.spec.extract import analyse_config
from tensorsleuth.porting.spec.hostile import hostile_model


def main(folder: Path, names: list[str]) -> None:
    """Print errors of prefill and decode by architecture."""
    warnings.simplefilter("ignore")
    quiet_transformers()
    torch.set_num_threads(1)
    found = {}
    for name in names:
        config = configuration(name)
        architecture = analyse_config(config)
        port = generate(architecture)
        file = write_port(port, folder / name)
        file = file.rename(file.with_name(f"port_{name.replace('-', '_')}.py"))
        errors = logit_errors(hostile_model(config), f"{file}:{port.class_name}", architecture)
        found[name] = [errors.prefill, errors.decode]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
