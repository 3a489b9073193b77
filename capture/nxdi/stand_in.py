"""A stand-in for the closed Neuron packages, so that the open NxD and NxD Inference sources run on a CPU.

It supplies exactly the names in `stand_in_names`. Importing one works; calling one that only the SDK has raises
NotImplementedError with its full name. A few names have behaviour, because the sources use them at import or on the
CPU path. It is installed only where the real packages are absent, per process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...store.errors import InputError
from .stand_in_names import NEURON_MODULES, PUBLIC_MODULES

_ADVICE = "the Neuron SDK has it, tensorsleuth's stand-in for a CPU has not"
#: Packages whose presence means that the Neuron SDK is installed.
SDK_PACKAGES = ("torch_neuronx", "torch_xla", "libneuronxla", "neuronxcc")
_MARKER_MODULE = ".models.layer_boundary_marker"


class MissingNeuronNameError(AttributeError, NotImplementedError):
    """A name that the stand-in does not have."""


class _NeuronOnly(type):
    """Metaclass of names that exist only with the SDK: good for annotations and base classes, not for use."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} was called: {_ADVICE}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _neuron_only(cls.__module__, f"{cls.__name__}.{name}")

    def __getitem__(cls, item: Any) -> Any:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} was launched: {_ADVICE}")


class _StandInModule(types.ModuleType):
    """A module of the stand-in; a name it lacks is reported with the module's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingNeuronNameError(f"{self.__name__}.{name} was used: {_ADVICE}")


def _neuron_only(module: str, name: str) -> Any:
    return _NeuronOnly(name, (), {"__module__": module})


def _decorator(*args: Any, **kwargs: Any) -> Any:
    """A decorator that leaves the function alone, with or without arguments."""
    if len(args) == 1 and not kwargs and callable(args[0]):
        return args[0]
    return lambda function: function


def _kernel_decorator(module: str) -> Callable[..., Any]:
    """`jit`: the decorated kernel can be defined, and raises when it is called."""

    def forbid(function: Callable[..., Any]) -> Any:
        return _neuron_only(getattr(function, "__module__", module), getattr(function, "__name__", "kernel"))

    def jit(*args: Any, **kwargs: Any) -> Any:
        return forbid(args[0]) if len(args) == 1 and not kwargs and callable(args[0]) else forbid

    return jit


def _xla_hlo_call(function: Callable[..., Any]) -> Any:
    """Layer boundary markers pass their tensors through; any other custom call needs the compiler."""
    module = getattr(function, "__module__", "")
    if module.endswith(_MARKER_MODULE):
        return lambda *tensors: tensors[0] if len(tensors) == 1 else tensors
    return _neuron_only(module, function.__name__)


class _CollectivesConfig:
    """Source and target ranks of collectives; `rank_src_tgt_pairs` is indexed by rank."""

    def __init__(self, replica_groups: Sequence[Sequence[int]], **_: Any) -> None:
        self.replica_groups = replica_groups
        self.rank_src_tgt_pairs = [(rank, rank) for group in replica_groups for rank in group]


class _Constructible:
    """A record that keeps what it is made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.__dict__.update(kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _behaviour(module: str) -> dict[str, Any]:
    """Names with behaviour in one module."""
    jit = _kernel_decorator(module)
    retry: dict[str, Any] = dict.fromkeys(("before_sleep_log", "retry_if_exception", "stop_after_attempt"), _nothing)
    known: dict[str, dict[str, Any]] = {
        "torch_xla.core.xla_model": {name: name.lower() for name in ("REDUCE_SUM", "REDUCE_MAX", "REDUCE_MIN")},
        "torch_xla.distributed.parallel_loader": {"MpDeviceLoader": type("MpDeviceLoader", (), {})},
        "torch_xla.distributed.zero_redundancy_optimizer": {
            "ZeroRedundancyOptimizer": _base("ZeroRedundancyOptimizer")
        },
        "torch_neuronx.utils": {"get_platform_target": lambda: "trn2"},
        "torch_neuronx.utils.utils": {"get_platform_target": lambda: "trn2", "SUPPORTED_TYPES": ()},
        "torch_neuronx.xla_impl.base": {"xla_hlo_call": _xla_hlo_call},
        "torch_neuronx.xla_impl.ops": {"nki_jit": jit, "xla_hlo_call": _xla_hlo_call},
        "neuronxcc.nki": {"jit": jit},
        "neuronxcc.nki._pre_prod_kernels.collectives": {"CollectivesConfig": _CollectivesConfig},
        "nki": {"jit": jit},
        "nkilib.core.moe.moe_cte.moe_cte_utils": {"SkipMode": type("SkipMode", (_Constructible,), {})},
        "tenacity": {**retry, "retry": _decorator},
        "tenacity.wait": {"wait_base": _base("wait_base")},
    }
    return known.get(module, {})


def _base(name: str) -> type:
    return type(name, (), {})


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of some absent packages; asked only after every other finder."""

    def __init__(self, names: dict[str, tuple[str, ...]]) -> None:
        """`names` maps modules to the names in them; parents come by themselves."""
        self._names = dict(names)
        for module in names:
            parts = module.split(".")
            for length in range(1, len(parts)):
                self._names.setdefault(".".join(parts[:length]), ())
        self._packages = {module.rpartition(".")[0] for module in self._names}

    @property
    def packages(self) -> tuple[str, ...]:
        """Top-level packages that it stands in for."""
        return tuple(sorted({module.partition(".")[0] for module in self._names}))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname not in self._names:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, self, origin="tensorsleuth stand-in", is_package=fullname in self._packages
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """See `importlib.abc.Loader`."""
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill a module with its names."""
        behaviour = _behaviour(module.__name__)
        for name in self._names[module.__name__]:
            setattr(module, name, behaviour.get(name) or _neuron_only(module.__name__, name))


def installed() -> StandInFinder | None:
    """The stand-in of this process, if there is one."""
    return next((finder for finder in sys.meta_path if isinstance(finder, StandInFinder)), None)


def install() -> StandInFinder:
    """Stand in for the packages that are absent; does nothing twice.

    transformers is imported first: it probes for torch_xla and must not find it.

    Raises:
        InputError: the Neuron SDK is installed; it needs no stand-in.
    """
    found = installed()
    if found is not None:
        return found
    present = [name for name in SDK_PACKAGES if _is_installed(name)]
    if present:
        raise InputError(f"{present[0]} is installed: the Neuron SDK runs the model, no stand-in is put in its place")
    import transformers.utils.import_utils

    transformers.utils.import_utils.is_torch_xla_available()
    names = {**NEURON_MODULES, **PUBLIC_MODULES}
    roots = {module.partition(".")[0] for module in names}
    absent = {root for root in roots if not _is_installed(root)}
    finder = StandInFinder({module: n for module, n in names.items() if module.partition(".")[0] in absent})
    sys.meta_path.append(finder)
    for name in ("SPMDModel", "LayoutTransformation"):
        if "neuron" not in torch.classes.__dict__:
            torch.classes.__dict__["neuron"] = types.SimpleNamespace()
        setattr(torch.classes.__dict__["neuron"], name, _neuron_only("torch.classes.neuron", name))
    return finder


def uninstall() -> None:
    """Take the stand-in and the modules it supplied out of this process."""
    finder = installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandInModule):
            del sys.modules[name]
    torch.classes.__dict__.pop("neuron", None)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
