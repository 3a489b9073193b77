"""Whether ports can be built and run here: every package is imported, in a process of its own.

The lines and exit codes are those of the Autoport skill's environment check: `FAILED:<package>` for one that is
missing, `RUNTIME_ERROR:<package>` for one that is there and does not import (installing it again will not help), and
`RESOLVED:<NAME>=<folder>` for the three source folders.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .environment import NXD, NXDI, SYSTEM_PACKAGES, Environment, Package, find_environment

READY, HARD_FAILURE, STILL_FAILING, INSTALL_REQUIRED, RUNTIME_ERROR = 0, 2, 3, 4, 5
_IMPORT_SECONDS = 300
_WITH_STAND_IN = "from tensorsleuth.capture.nxdi.port import activate; activate(); import {name}"

#: Imports a package in a new process: None when that worked, else the last line of the error.
Importer = Callable[[str, bool], "str | None"]


@dataclass(frozen=True)
class Readiness:
    """What was found, and what does not work.

    Attributes:
        environment: what was found.
        failed: names of packages that are missing or placeholders, with what to do.
        broken: names of packages that are there but cannot be imported, with the error.
    """

    environment: Environment
    failed: dict[str, str]
    broken: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0 ready, 2 unusable, 5 packages are there but cannot be imported."""
        if self.failed:
            return HARD_FAILURE
        return RUNTIME_ERROR if self.broken else READY

    def lines(self) -> list[str]:
        """What `sleuth port env` prints."""
        found = self.environment
        sdk = ", ".join(f"{name} {version or ''}".strip() for name, version in found.sdk.items())
        lines = [
            f"platform: {found.platform}, Python {found.python}",
            f"Neuron SDK: {sdk or 'not installed; ports run on this CPU with the stand-in'}",
            f"Neuron devices: {', '.join(found.devices) or 'none'}",
            *(_package_line(name, package) for name, package in self._packages()),
        ]
        missing = [name for name, version in found.system_packages.items() if version is None]
        if found.has_sdk or len(missing) < len(SYSTEM_PACKAGES):
            lines.append(f"system packages missing: {', '.join(missing) or 'none'}")
        for name, advice in self.failed.items():
            lines += [f"FAILED:{name}", f"  {advice}"]
        for name, error in self.broken.items():
            lines += [f"RUNTIME_ERROR:{name}", f"  {error}"]
        if not self.failed and not self.broken:
            variables = {NXDI: "NXDI_SRC", NXD: "NXD_SRC", "transformers": "TRANSFORMERS_SRC"}
            lines += [f"RESOLVED:{variables[name]}={p.folder}" for name, p in self._packages() if p is not None]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        found = self.environment
        return {
            "platform": found.platform,
            "python": found.python,
            "sdk": dict(found.sdk),
            "devices": list(found.devices),
            "system_packages": dict(found.system_packages),
            "packages": {
                name: None if p is None else {"folder": str(p.folder), "version": p.version, "origin": p.origin}
                for name, p in self._packages()
            },
            "placeholders": list(found.placeholders),
            "failed": self.failed,
            "runtime_errors": self.broken,
            "exit_code": self.exit_code,
        }

    def _packages(self) -> list[tuple[str, Package | None]]:
        found = self.environment
        return [(NXDI, found.nxdi), (NXD, found.nxd), ("transformers", found.transformers)]


def check_readiness(*, device: bool = False, importer: Importer | None = None) -> Readiness:
    """Look for every package and import it.

    Args:
        device: require the Neuron SDK and its system packages too.
        importer: how packages are imported; in a process of their own by default.

    Raises:
        InputError: NXDI_SRC or NXD_SRC names a folder that does not hold its package.
    """
    found = find_environment()
    failed = dict.fromkeys(found.placeholders, "an empty placeholder from PyPI: uninstall it")
    for name, package in ((NXDI, found.nxdi), (NXD, found.nxd)):
        if package is None:
            variable = "NXDI_SRC" if name == NXDI else "NXD_SRC"
            failed[name] = f"set {variable} to the folder of a source checkout, or install the Neuron SDK"
    if found.transformers is None:
        failed["transformers"] = "pip install 'tensorsleuth[capture]'"
    if device:
        if not found.has_sdk:
            failed["torch_neuronx"] = "install the Neuron SDK from its own index"
        failed.update(
            {name: "install the system package" for name, version in found.system_packages.items() if version is None}
        )
    broken: dict[str, str] = {}
    if not failed:
        run = importer or import_in_new_process
        names = ["transformers", *(["torch_neuronx"] if found.has_sdk else []), NXD, NXDI]
        broken = {name: error for name in names if (error := run(name, name in (NXD, NXDI))) is not None}
    return Readiness(found, failed, broken)


def import_in_new_process(name: str, activated: bool) -> str | None:
    """Import a package in a new process; None when that worked, else the last line of the error."""
    code = _WITH_STAND_IN.format(name=name) if activated else f"import {name}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the import did not end within {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with exit code {done.returncode}"


def _package_line(name: str, package: Package | None) -> str:
    if package is None:
        return f"{name}: not found"
    return f"{name}: {package.version or 'unknown version'} ({package.origin}) at {package.folder}"
