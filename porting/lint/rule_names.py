"""Rules about names: imports, attributes of modules, and calls of what was imported."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator

from .api import Entry, Release
from .diagnostics import Finding, rule
from .signatures import CallShape, Signature
from .source import LocalFunction, Name, PortClass, PortFile

_DEPRECATED = "transformers_neuronx"


@rule("deprecated-library", "error", "transformers_neuronx is a retired library; ports use NxD Inference")
def deprecated_library(file: PortFile) -> Iterator[Finding]:
    """Imports of transformers_neuronx."""
    for node, module in _imported_modules(file):
        if module.partition(".")[0] == _DEPRECATED:
            yield Finding(
                node, f"{module} belongs to a retired library", "import it from neuronx_distributed_inference"
            )


@rule("unknown-module", "error", "an imported module does not exist in the release")
def unknown_module(file: PortFile) -> Iterator[Finding]:
    """Imports of modules that the release lacks."""
    for node, module in _imported_modules(file):
        if file.release.covers(module) and not file.release.has_module(module) and not file.is_guarded(node):
            yield Finding(node, f"SDK {file.release.name} has no module {module}", _module_fix(file.release, module))


@rule("unknown-name", "error", "an imported name, or an attribute of an imported module, does not exist in the release")
def unknown_name(file: PortFile) -> Iterator[Finding]:
    """Names that the release lacks."""
    for node in file.walk(ast.ImportFrom):
        assert isinstance(node, ast.ImportFrom)
        module = file.absolute(node)
        if not file.release.covers(module) or not file.release.has_module(module) or file.is_guarded(node):
            continue
        for alias in node.names:
            if alias.name != "*" and file.release.find(module, alias.name) is None:
                yield _unknown(file.release, node, module, alias.name)
    patched = {
        node.attr
        for node in file.walk(ast.Attribute)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in file.walk(ast.Attribute):
        assert isinstance(node, ast.Attribute)
        base = file.resolve(node.value)
        if not (isinstance(base, Entry) and base.kind == "module" and file.release.covers(base.module)):
            continue
        if node.attr in patched or node.attr.startswith("__") or file.is_guarded(node):
            continue
        if file.release.find(base.module, node.attr) is None:
            yield _unknown(file.release, node, base.module, node.attr)


@rule("unknown-argument", "error", "a call passes an argument that the function, class or method does not take")
def unknown_argument(file: PortFile) -> Iterator[Finding]:
    """Calls with unknown keyword arguments."""
    yield from _misfits(file, "unknown argument")


@rule("missing-argument", "error", "a call leaves out an argument that the function, class or method requires")
def missing_argument(file: PortFile) -> Iterator[Finding]:
    """Calls without a required argument."""
    yield from _misfits(file, "argument ")


@rule("too-many-arguments", "error", "a call passes more positional arguments than there are parameters")
def too_many_arguments(file: PortFile) -> Iterator[Finding]:
    """Calls with too many positional arguments, for example to a constructor that takes keywords only."""
    yield from _misfits(file, "takes ")


def _misfits(file: PortFile, start: str) -> Iterator[Finding]:
    """Calls of the library that fail with a problem that starts so."""
    for node in file.walk(ast.Call):
        assert isinstance(node, ast.Call)
        called = _called(file, node)
        if called is None:
            continue
        name, signature = called
        why = signature.problem(CallShape.of(node))
        if why is not None and why.startswith(start):
            names = ", ".join((*signature.positional, *signature.keyword_only)) or "nothing"
            kind = " (keyword-only after the first)" if signature.keyword_only and start == "takes " else ""
            yield Finding(
                node, f"{name} of SDK {file.release.name}: {why}", f"it takes {names}{kind}; correct the call"
            )


def _called(file: PortFile, node: ast.Call) -> tuple[str, Signature] | None:
    """Name and signature of what a call calls, as far as that is known for certain."""
    function = node.func
    thing = file.resolve(function)
    if isinstance(thing, Entry):
        if thing.kind == "function":
            return thing.text, file.release.function(thing)
        return _constructor(file.release, thing) if thing.kind == "class" else None
    if isinstance(thing, PortClass) and thing.fully_known and not thing.node.decorator_list:
        signature = thing.signature("__init__")
        return None if signature is None else (f"{thing.name}", signature)
    if not isinstance(function, ast.Attribute):
        return None
    if _is_super(function.value):
        around = file.class_around(node)
        return None if around is None else _inherited(around, function.attr)
    owner = file.resolve(function.value)
    if isinstance(owner, Entry) and owner.kind == "class":
        found = file.release.method(owner, function.attr)
        if found is not None and found[1].kind in ("static", "class"):
            return f"{owner.text}.{function.attr}", found[1]
    return None


def _constructor(release: Release, thing: Entry) -> tuple[str, Signature] | None:
    found = release.method(thing, "__init__")
    return None if found is None else (thing.text, found[1])


def _inherited(around: PortClass, name: str) -> tuple[str, Signature] | None:
    """A method that `super()` finds, if the nearest base with it is the library's."""
    for base in around.bases:
        if isinstance(base, Entry) and base.kind == "class":
            found = around.file.release.method(base, name)
            if found is not None:
                return f"{base.text}.{name}", found[1]
        if isinstance(base, PortClass) and (signature := base.signature(name)):
            return f"{base.name}.{name}", signature
        if isinstance(base, (Name, LocalFunction)):
            return None
    return None


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


@rule("unknown-super-method", "error", "super() is asked for a method that no base class has")
def unknown_super_method(file: PortFile) -> Iterator[Finding]:
    """Calls of `super().method()` where the method does not exist in the release."""
    for node in file.walk(ast.Call):
        assert isinstance(node, ast.Call)
        function = node.func
        if not isinstance(function, ast.Attribute) or not _is_super(function.value):
            continue
        around = file.class_around(node)
        if around is None or not around.fully_known or not list(around.library_bases()):
            continue
        name = function.attr
        known = any(base.signature(name) for base in around.bases if isinstance(base, PortClass))
        known = known or any(file.release.method(base, name) for base in around.bases if isinstance(base, Entry))
        if not known and not (name.startswith("__") or (around.is_module and name in _TORCH_METHODS)):
            bases = ", ".join(ast.unparse(base) for base in around.node.bases)
            yield Finding(
                node,
                f"no base class of {around.name} ({bases}) has {name} in SDK {file.release.name}",
                "delete the call, or base it on what the release has",
            )


#: Methods of torch.nn.Module that subclasses extend.
_TORCH_METHODS = frozenset(
    (
        "forward",
        "to",
        "train",
        "eval",
        "state_dict",
        "load_state_dict",
        "named_parameters",
        "named_modules",
        "named_buffers",
        "parameters",
        "buffers",
        "children",
        "modules",
        "register_buffer",
        "register_parameter",
        "extra_repr",
        "apply",
        "cuda",
        "cpu",
        "half",
        "float",
        "bfloat16",
        "requires_grad_",
        "zero_grad",
        "add_module",
        "get_submodule",
        "_apply",
        "_load_from_state_dict",
        "_save_to_state_dict",
    )
)


def _imported_modules(file: PortFile) -> Iterator[tuple[ast.stmt, str]]:
    for node in file.walk(ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module or ""


def _unknown(release: Release, node: ast.AST, module: str, name: str) -> Finding:
    message = f"{module} of SDK {release.name} has no {name}"
    places = release.places(name)
    if places:
        return Finding(node, message, f"it is in {' or '.join(places[:3])}")
    close = difflib.get_close_matches(name, release.names_of(module), 3)
    return Finding(
        node, message, f"names like it there: {', '.join(close)}" if close else "no module of it has the name"
    )


def _module_fix(release: Release, module: str) -> str:
    same = release.modules_called(module.rpartition(".")[2])
    return f"modules of that name: {', '.join(same[:3])}" if same else "see the release's sources for what replaced it"
