"""What this machine has to build and run NxD Inference ports with.

NxD and NxD Inference come from the Neuron SDK, or from source checkouts that the environment variables NXD_SRC and
NXDI_SRC name. The packages of these names on PyPI are empty placeholders; they are recognised and refused.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..store.errors import InputError

NXDI, NXD = "neuronx_distributed_inference", "neuronx_distributed"
#: Environment variable that names the source folder of each package.
VARIABLES = {NXDI: "NXDI_SRC", NXD: "NXD_SRC"}
#: Packages of the Neuron SDK without published sources.
SDK_PACKAGES = ("torch_neuronx", "torch_xla", "libneuronxla", "neuronxcc")
#: System packages that a Neuron device needs.
SYSTEM_PACKAGES = ("aws-neuronx-dkms", "aws-neuronx-runtime-lib", "aws-neuronx-collectives", "aws-neuronx-tools")
_DISTRIBUTIONS = (
    "torch-neuronx",
    "torch-xla",
    "libneuronxla",
    "neuronx-cc",
    "neuronx-distributed",
    "neuronx-distributed-inference",
)
_WRONG_PACKAGE = "WRONG PACKAGE"
_VERSION = re.compile(r"""__version__\s*=\s*["']([^"']+)["']""")


@dataclass(frozen=True)
class Package:
    """A package that was found.

    Attributes:
        name: its import name.
        folder: the folder of the package itself.
        version: its version, None when it does not say.
        origin: `installed`, or the environment variable that names it.
    """

    name: str
    folder: Path
    version: str | None
    origin: str

    @property
    def parent(self) -> Path:
        """The folder that holds the package: what goes onto the import path."""
        return self.folder.parent


@dataclass(frozen=True)
class Environment:
    """What was found.

    Attributes:
        nxdi: NxD Inference, None when absent.
        nxd: NxD, None when absent.
        transformers: transformers, None when absent.
        sdk: closed SDK packages that are installed, by import name with their version.
        placeholders: distributions that are empty placeholders from PyPI.
        system_packages: Neuron system packages with their version, None for one that is missing.
        devices: Neuron devices of this machine.
        platform: operating system.
        python: version of Python.
    """

    nxdi: Package | None
    nxd: Package | None
    transformers: Package | None
    sdk: Mapping[str, str | None]
    placeholders: tuple[str, ...]
    system_packages: Mapping[str, str | None]
    devices: tuple[str, ...]
    platform: str
    python: str

    @property
    def has_sdk(self) -> bool:
        """Whether the Neuron SDK is installed."""
        return "torch_neuronx" in self.sdk


def find_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Look at this machine. Nothing is imported, so this is safe with a broken SDK.

    Args:
        variables: environment variables, those of the process by default.

    Raises:
        InputError: NXDI_SRC or NXD_SRC names a folder that does not hold its package.
    """
    chosen = os.environ if variables is None else variables
    placeholders = tuple(name for name in _DISTRIBUTIONS if is_placeholder(name))
    refused = {name.replace("-", "_") for name in placeholders}
    return Environment(
        nxdi=_source(NXDI, chosen) or (_installed(NXDI) if NXDI not in refused else None),
        nxd=_source(NXD, chosen) or (_installed(NXD) if NXD not in refused else None),
        transformers=_installed("transformers"),
        sdk={
            name: package.version
            for name in SDK_PACKAGES
            if name not in refused and (package := _installed(name)) is not None
        },
        placeholders=placeholders,
        system_packages={name: _system_version(name) for name in SYSTEM_PACKAGES},
        devices=tuple(sorted(str(path) for path in Path("/dev").glob("neuron[0-9]*"))),
        platform=platform.platform(),
        python=platform.python_version(),
    )


def require_sources(environment: Environment) -> tuple[Package, Package]:
    """NxD Inference and NxD.

    Raises:
        InputError: one is missing, or a placeholder from PyPI is in its place.
    """
    if environment.placeholders:
        names = ", ".join(environment.placeholders)
        raise InputError(
            f"{names} from PyPI is an empty placeholder: pip uninstall it; the real package comes from the Neuron "
            "SDK's own index, or as a source checkout that NXDI_SRC and NXD_SRC name"
        )
    missing = [name for name, found in ((NXDI, environment.nxdi), (NXD, environment.nxd)) if found is None]
    if environment.nxdi is None or environment.nxd is None:
        names = " and ".join(VARIABLES[name] for name in missing)
        raise InputError(
            f"{' and '.join(missing)} not found; set {names} to the folder of a source checkout that holds the "
            "package, or install the Neuron SDK (the PyPI packages of these names are empty)"
        )
    return environment.nxdi, environment.nxd


def is_placeholder(distribution: str) -> bool:
    """Whether an installed distribution is the empty one that PyPI has under a Neuron package's name."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    if _WRONG_PACKAGE in (found.read_text("METADATA") or ""):
        return True
    modules = [path for path in found.files or () if path.suffix in (".py", ".so")]
    return bool(found.files) and all(path.name == "__init__.py" for path in modules) and len(modules) <= 1


def _source(name: str, variables: Mapping[str, str]) -> Package | None:
    variable = VARIABLES[name]
    value = variables.get(variable)
    if not value:
        return None
    given = Path(value).expanduser()
    for folder in (given / name, given / "src" / name, given):
        if folder.name == name and (folder / "__init__.py").is_file():
            return Package(name, folder.resolve(), _source_version(folder), variable)
    raise InputError(f"{variable}={value} holds no package {name}; name the folder that contains {name}/__init__.py")


def _source_version(folder: Path) -> str | None:
    for file in (folder / "_version.py", folder / "__init__.py"):
        if file.is_file() and (match := _VERSION.search(file.read_text(encoding="utf-8"))):
            return match[1]
    return None


def _installed(name: str) -> Package | None:
    module = sys.modules.get(name)
    try:
        spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    folder = Path(spec.origin).parent
    try:
        version: str | None = metadata.version("neuronx-cc" if name == "neuronxcc" else name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        version = _source_version(folder)
    return Package(name, folder, version, "installed")


def _system_version(package: str) -> str | None:
    commands = {"dpkg-query": ["-W", "-f=${Version}", package], "rpm": ["-q", "--qf", "%{VERSION}", package]}
    for program, arguments in commands.items():
        path = shutil.which(program)
        if path is None:
            continue
        found = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    return None
