"""Rules about configuration: keys that the release drops, attributes that it does not have."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .api import Entry, Release, known_releases, load_release
from .diagnostics import Finding, rule
from .source import PortClass, PortFile

_NEURON_CONFIG = "NeuronConfig"


@rule("compiler-args-key", "error", "compiler_args is no key of NeuronConfig; it is dropped")
def compiler_args_key(file: PortFile) -> Iterator[Finding]:
    """Compiler arguments given to NeuronConfig."""
    for node, name, config in _keys(file):
        if name == "compiler_args":
            yield Finding(
                node,
                f"{config} has no compiler_args: the compiler never sees them, a warning in the log is all",
                "return them from get_compiler_args of the causal model",
            )


@rule(
    "unknown-config-key", "error", "a configuration class is given a key that the release does not have, and drops it"
)
def unknown_config_key(file: PortFile) -> Iterator[Finding]:
    """Keys of NeuronConfig and its like that do not exist."""
    for node, name, config in _keys(file):
        if name != "compiler_args":
            yield Finding(
                node,
                f"{config} of SDK {file.release.name} has no key {name!r}: it is dropped with a warning in the log",
                _elsewhere(file.release, name),
            )


@rule("unknown-config-attribute", "error", "neuron_config is asked for an attribute that the release does not have")
def unknown_config_attribute(file: PortFile) -> Iterator[Finding]:
    """Reads of `neuron_config.name`."""
    known = _config_attributes(file)
    for node in file.walk(ast.Attribute):
        assert isinstance(node, ast.Attribute)
        if not isinstance(node.ctx, ast.Load) or node.attr in known or node.attr.startswith("__"):
            continue
        if _is_neuron_config(node.value) and not file.is_guarded(node):
            yield Finding(
                node,
                f"the neuron configuration of SDK {file.release.name} has no attribute {node.attr!r}",
                _elsewhere(file.release, node.attr),
            )


def _keys(file: PortFile) -> Iterator[tuple[ast.AST, str, str]]:
    """Keys that a configuration class is given and does not take: node, key, class."""
    for node in file.walk(ast.Call):
        assert isinstance(node, ast.Call)
        made = file.resolve(node.func)
        accepted = _accepted(file, made) if isinstance(made, (Entry, PortClass)) else None
        if accepted is None or not isinstance(made, (Entry, PortClass)):
            continue
        for place, name in _given(file, node):
            if name not in accepted:
                yield place, name, made.name


def _given(file: PortFile, call: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    """Keys of a call: keywords, and those of a dictionary that is spread into it."""
    for word in call.keywords:
        if word.arg is not None:
            yield word.value, word.arg
            continue
        spread = word.value
        if isinstance(spread, ast.Name):
            scope = file.function_around(call) or file.tree
            values = [
                node.value
                for node in file.within(scope)
                if isinstance(node, ast.Assign)
                and any(isinstance(target, ast.Name) and target.id == spread.id for target in node.targets)
            ]
            spread = values[0] if len(values) == 1 else spread
        if isinstance(spread, ast.Dict):
            for key in spread.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key, key.value
        elif isinstance(spread, ast.Call) and getattr(spread.func, "id", "") == "dict":
            yield from ((inner.value, inner.arg) for inner in spread.keywords if inner.arg is not None)


def _accepted(file: PortFile, made: Entry | PortClass) -> set[str] | None:
    """Keys that a configuration class takes; None if it is none, or takes keys that are not known."""
    if isinstance(made, Entry):
        if made.kind != "class":
            return None
        keys = file.release.members(made, "kwargs")
        init = file.release.method(made, "__init__")
        if not keys or init is None or not init[1].double_star:
            return None
        names = set(init[1].names)
        for base in file.release.lineage(made):
            found = file.release.method(base, "__init__") if base.kind == "class" else None
            names |= set(found[1].names) if found is not None else set()
        return keys | names
    if not made.derives_from(_NEURON_CONFIG) or not made.fully_known:
        return None
    library = next(made.library_bases())
    accepted = _accepted(file, library)
    own = made.own_method("__init__")
    if accepted is None or (own is not None and not _passes_on(own[1])):
        return None
    for one in made.lineage():
        if isinstance(one, PortClass) and (init_node := one.methods.get("__init__")) is not None:
            accepted = accepted | {arg.arg for arg in (*init_node.args.args, *init_node.args.kwonlyargs)}
            accepted |= {
                node.value
                for node in file.within(init_node)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
    return accepted


def _passes_on(init: ast.AST) -> bool:
    """Whether a constructor hands its `**kwargs` to the base class."""
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("__init__")
        and any(w.arg is None for w in node.keywords)
        for node in ast.walk(init)
    )


def _is_neuron_config(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "neuron_config") or (
        isinstance(node, ast.Name) and node.id == "neuron_config"
    )


def _config_attributes(file: PortFile) -> set[str]:
    """Attributes of all NeuronConfig classes, and those that the port sets or tests for."""
    known: set[str] = set()
    for module in file.release.places(_NEURON_CONFIG):
        root = Entry("class", module, _NEURON_CONFIG)
        known |= _members(file.release, root)
    for entry in file.release.subclasses(_NEURON_CONFIG):
        known |= _members(file.release, entry)
    for node in file.within(file.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            known.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            known |= {str(item.value) for item in node.args[1:2] if isinstance(item, ast.Constant)}
    for thing in (file.resolve(ast.Name(name, ast.Load())) for name in file.imports):
        if isinstance(thing, PortClass) and thing.derives_from(_NEURON_CONFIG):
            known |= {node.attr for node in thing.file.within(thing.node) if isinstance(node, ast.Attribute)} | set(
                thing.methods
            )
    return known


def _members(release: Release, entry: Entry) -> set[str]:
    return set().union(*(release.members(entry, group) for group in ("attributes", "methods", "kwargs")))


def _elsewhere(release: Release, name: str) -> str:
    """Advice for a name that another release has, or none."""
    others = []
    for other in known_releases():
        if other == release.name:
            continue
        table = load_release(other)
        entries = [Entry("class", module, _NEURON_CONFIG) for module in table.places(_NEURON_CONFIG)]
        if any(name in _members(table, entry) for entry in (*entries, *table.subclasses(_NEURON_CONFIG))):
            others.append(other)
    if others:
        return f"SDK {', '.join(others)} has it; port it to what SDK {release.name} has, or require that release"
    return "delete it, or spell it as the release does"
