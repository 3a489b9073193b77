"""Loading a port: the model class that a user names as FILE:CLASS, on the real SDK or on the stand-in.

A port file is code. It runs because the user named it, and only then.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...porting.environment import Environment, find_environment, require_sources
from ...store.errors import InputError
from . import stand_in


@dataclass(frozen=True)
class ClassReference:
    """A class in a file or in an importable module.

    Attributes:
        place: path of a Python file, or a dotted module name.
        name: name of the class.
    """

    place: str
    name: str

    @property
    def text(self) -> str:
        """As the user writes it."""
        return f"{self.place}:{self.name}"


def parse_class(text: str) -> ClassReference:
    """Parse FILE:CLASS, or MODULE:CLASS for a class of an importable module.

    Raises:
        InputError: the text has another form, or the file does not exist.
    """
    place, separator, name = text.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise InputError(f"{text!r} names no class; write FILE:CLASS, for example modeling_x.py:NeuronXForCausalLM")
    if place.endswith(".py") and not Path(place).is_file():
        raise InputError(f"port file {place} does not exist; name the Python file that defines {name}")
    return ClassReference(place, name)


def activate(environment: Environment | None = None) -> Environment:
    """Make NxD and NxD Inference importable: the SDK's, or the source checkouts on top of the stand-in.

    Raises:
        InputError: there are no sources, or placeholders from PyPI are in their place.
    """
    found = environment or find_environment()
    nxdi, nxd = require_sources(found)
    if not found.has_sdk:
        stand_in.install()
    for package in (nxd, nxdi):
        if package.origin != "installed" and str(package.parent) not in sys.path:
            sys.path.insert(0, str(package.parent))
    logging.getLogger("Neuron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("neuronx_distributed_inference.models.application_base")
        except Exception as error:
            raise InputError(
                f"NxD Inference {nxdi.version} at {nxdi.folder} cannot be imported: {type(error).__name__}: {error}"
            ) from error
    _quiet()
    return found


def load_class(reference: ClassReference) -> Any:
    """The class a reference names; runs the file.

    Raises:
        InputError: the file cannot be imported or has no such class.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = _load_module(reference.place)
    except Exception as error:
        raise InputError(f"{reference.place} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, reference.name, None)
    if not isinstance(found, type):
        known = ", ".join(name for name, value in vars(module).items() if _is_defined_in(value, module)) or "none"
        raise InputError(f"{reference.place} defines no class {reference.name}; its classes: {known}")
    return found


def _load_module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    name = ".".join(parts)
    if len(parts) == 1 and importlib.util.find_spec(name) is not None and name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    return importlib.import_module(name)


def _is_defined_in(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _quiet() -> None:
    """Keep the libraries' progress lines off the terminal; errors still show."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("Neuron", "neuronx_distributed", "nxd", "Nxd")):
            logging.getLogger(name).setLevel(logging.ERROR)
