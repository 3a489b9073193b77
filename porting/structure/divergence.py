"""Classes of a port that differ between the CPU and the device, found in its syntax tree.

A component that is one class on a CPU and another on the device has to be tested twice: a CPU run says nothing about
the second. Comments and text are ignored; factories are followed into the modules they come from.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..environment import NXD, NXDI, Environment, find_environment
from ..lint.api import known_releases, load_release
from ..lint.source import Function, PortFile

_VARIABLE = "NXD_CPU_MODE"
_KERNEL_PACKAGES = ("nki", "nkilib", "neuronxcc")
_DEPTH = 3
_ADVICE = "test it twice: once with the class of the CPU, once with that of the device"
_KERNEL_ADVICE = "runs on the device only: compare what it computes with the plain operators that a CPU runs instead"


@dataclass(frozen=True)
class Divergence:
    """One place where the class depends on where the port runs.

    Attributes:
        kind: `factory`, `assignment`, `expression` or `kernel`.
        component: what gets the class: `self.norm`, or the name of the factory or kernel.
        cpu: class (or expression) on a CPU; empty if nothing is used there.
        device: class (or expression) on the device.
        condition: what is tested; empty for kernels.
        line: line of the place in the port.
        defined_in: file that makes the choice, where it is not the port; with its line.
        users: lines of the port that use the factory or kernel.
        recommendation: what to do.
    """

    kind: str
    component: str
    cpu: str
    device: str
    condition: str
    line: int
    defined_in: str = ""
    users: tuple[int, ...] = ()
    recommendation: str = _ADVICE


def find_divergences(path: Path, environment: Environment | None = None) -> list[Divergence]:
    """Places of a port where the class depends on CPU or device, by line.

    Args:
        path: the port's Python file.
        environment: where the library's sources are; this machine's by default. Without them, factories that are
            imported from the library are not followed.

    Raises:
        InputError: the file cannot be read, or is not Python.
    """
    file = PortFile(path, load_release(known_releases()[-1]))
    found = [*_own(file), *_imported(file, environment or find_environment()), *_kernels(file)]
    return sorted(dict.fromkeys(found), key=lambda item: (item.line, item.kind, item.component))


def report(path: Path, divergences: list[Divergence]) -> dict[str, Any]:
    """The content of class_divergence_report.json."""
    classes = [item for item in divergences if item.kind != "kernel"]
    return {
        "file": str(path),
        "has_divergence": bool(classes),
        "n_divergences": len(classes),
        "n_kernels": len(divergences) - len(classes),
        "divergences": [{**vars(item), "users": list(item.users)} for item in divergences],
    }


def _own(file: PortFile) -> Iterator[Divergence]:
    """Choices that the file makes itself."""
    for node in file.walk(ast.IfExp, ast.If):
        function = file.function_around(node)
        names = _flags(file, function)
        if isinstance(node, ast.IfExp) and (on_cpu := _tests_cpu(node.test, names)) is not None:
            first, second = (node.body, node.orelse) if on_cpu else (node.orelse, node.body)
            yield _of_expression(file, node, function, ast.unparse(first), ast.unparse(second))
        elif isinstance(node, ast.If) and (on_cpu := _tests_cpu(node.test, names)) is not None:
            yield from _of_statement(file, node, function, on_cpu)


def _of_expression(file: PortFile, node: ast.IfExp, function: Function | None, cpu: str, device: str) -> Divergence:
    statement = node if isinstance(node, ast.stmt) else file.enclosing(node, ast.stmt)
    condition = ast.unparse(node.test)
    if isinstance(statement, ast.Return) and function is not None:
        return Divergence(
            "factory", function.name, cpu, device, condition, node.lineno, users=_users(file, function.name)
        )
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    component = ", ".join(map(ast.unparse, targets)) or (function.name if function is not None else "module")
    return Divergence("expression", component, cpu, device, condition, node.lineno)


def _of_statement(file: PortFile, node: ast.If, function: Function | None, on_cpu: bool) -> Iterator[Divergence]:
    """Returns and assignments that an `if` chooses between."""
    condition = ast.unparse(node.test)
    returned = [_returns(node.body), _returns(node.orelse or (_after(file, node) if _returns(node.body) else []))]
    if returned[0] and function is not None:
        cpu, device = returned if on_cpu else returned[::-1]
        if cpu != device:
            users = _users(file, function.name)
            yield Divergence("factory", function.name, cpu, device, condition, node.lineno, users=users)
    first, second = _assignments(node.body), _assignments(node.orelse)
    before = _assignments(_before(file, node))
    for name in {**first, **second}:
        one, other = first.get(name, before.get(name, "")), second.get(name, before.get(name, ""))
        cpu, device = (one, other) if on_cpu else (other, one)
        if cpu != device and (_is_class_like(cpu) or _is_class_like(device)):
            yield Divergence("assignment", name, cpu, device, condition, node.lineno)


def _imported(file: PortFile, environment: Environment, depth: int = _DEPTH) -> Iterator[Divergence]:
    """Factories that the file imports and that choose by CPU or device, where it uses them."""
    for name, source in file.imports.items():
        module, separator, inner = source.partition(":")
        users = _users(file, name)
        if not separator or not users:
            continue
        other = file.sibling(module, inner) or _library_file(file, module, environment)
        if other is None:
            continue
        for item in _factory(other, inner, environment, depth):
            place = item.defined_in or f"{other.path}:{item.line}"
            yield replace(item, component=name, line=users[0], users=users, defined_in=place)


def _factory(file: PortFile, name: str, environment: Environment, depth: int) -> Iterator[Divergence]:
    if name in file.functions:
        yield from (item for item in _own(file) if item.kind == "factory" and item.component == name)
    elif depth and name in file.imports:
        module, separator, inner = file.imports[name].partition(":")
        other = (file.sibling(module, inner) or _library_file(file, module, environment)) if separator else None
        if other is not None:
            for item in _factory(other, inner, environment, depth - 1):
                yield replace(item, defined_in=item.defined_in or f"{other.path}:{item.line}")


def _library_file(file: PortFile, module: str, environment: Environment) -> PortFile | None:
    """A module of the library's sources, where they are."""
    root = module.partition(".")[0]
    package = {NXDI: environment.nxdi, NXD: environment.nxd}.get(root)
    if package is None:
        return None
    path = package.parent.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return file.related(candidate)
    return None


def _kernels(file: PortFile) -> Iterator[Divergence]:
    """Device kernels that the file imports and uses."""
    for node in file.walk(ast.Import, ast.ImportFrom):
        aliases: list[tuple[str, str]] = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            aliases = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            aliases = [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
        for name, full in aliases:
            if full.partition(".")[0] in _KERNEL_PACKAGES and isinstance(node, (ast.Import, ast.ImportFrom)):
                users = _users(file, name)
                yield Divergence("kernel", name, "", full, "", node.lineno, users=users, recommendation=_KERNEL_ADVICE)


def _flags(file: PortFile, function: Function | None) -> frozenset[str]:
    """Names that hold whether the port runs on a CPU: assigned from a test of it, in the function or at top level."""
    found: set[str] = set()
    for scope in (file.tree.body, function.body if function is not None else []):
        for statement in scope:
            for node in ast.walk(statement):
                if isinstance(node, ast.Assign) and _tests_cpu(node.value, frozenset(found)) is True:
                    found |= {ast.unparse(target) for target in node.targets}
    return frozenset(found)


def _tests_cpu(test: ast.expr, names: frozenset[str]) -> bool | None:
    """Whether a condition is true on a CPU; None if it does not ask where the port runs."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _tests_cpu(test.operand, names)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        answers = [answer for answer in (_tests_cpu(value, names) for value in test.values) if answer is not None]
        return answers[0] if answers else None
    if isinstance(test, ast.Compare):
        return _compares_cpu(test, names)
    if ast.unparse(test) in names:
        return True
    if isinstance(test, ast.Call):
        function = ast.unparse(test.func)
        if function.rpartition(".")[2] in ("cpu_mode", "is_cpu_mode", "on_cpu"):
            return True
        if function in ("os.environ.get", "os.getenv", "environ.get", "getenv"):
            return True if test.args and _is_variable(test.args[0]) else None
        if function in ("bool", "int", "str") and test.args:
            return _tests_cpu(test.args[0], names)
        if function == "getattr" and len(test.args) > 1 and getattr(test.args[1], "value", "") == "on_cpu":
            return True
        return _tests_cpu(test.func.value, names) if isinstance(test.func, ast.Attribute) else None
    if isinstance(test, ast.Attribute) and test.attr in ("on_cpu", "cpu_mode"):
        return True
    if isinstance(test, ast.Subscript) and _is_variable(test.slice):
        return True
    return None


def _compares_cpu(test: ast.Compare, names: frozenset[str]) -> bool | None:
    """`"NXD_CPU_MODE" in os.environ`, `os.environ.get(...) == "1"`, `!= "0"`, `is None`."""
    operator, right = test.ops[0], test.comparators[0]
    if isinstance(operator, (ast.In, ast.NotIn)) and _is_variable(test.left):
        return isinstance(operator, ast.In)
    answer = _tests_cpu(test.left, names)
    if answer is None:
        return None
    value = right.value if isinstance(right, ast.Constant) else "1"
    says_yes = value not in (None, 0, "0", "", False, "false", "False")
    return answer if says_yes == isinstance(operator, (ast.Eq, ast.Is)) else not answer


def _is_variable(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == _VARIABLE


def _returns(body: list[ast.stmt]) -> str:
    """What a block returns, if it is one thing."""
    values = [node.value for node in body if isinstance(node, ast.Return) and node.value is not None]
    return ast.unparse(values[0]) if len(values) == 1 else ""


def _assignments(body: list[ast.stmt]) -> dict[str, str]:
    return {
        ast.unparse(target): ast.unparse(node.value)
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def _block(file: PortFile, node: ast.stmt) -> list[ast.stmt]:
    parent = file.parents.get(node)
    blocks = [getattr(parent, name, []) for name in ("body", "orelse", "finalbody")]
    return next((block for block in blocks if isinstance(block, list) and node in block), [])


def _after(file: PortFile, node: ast.stmt) -> list[ast.stmt]:
    block = _block(file, node)
    return block[block.index(node) + 1 :] if node in block else []


def _before(file: PortFile, node: ast.stmt) -> list[ast.stmt]:
    block = _block(file, node)
    return block[: block.index(node)] if node in block else []


def _is_class_like(text: str) -> bool:
    """Whether an expression is a class, or an instance made of one: its last name is capitalised."""
    name = text.partition("(")[0].rpartition(".")[2].strip("_")
    return bool(name) and name[0].isupper() and not name.isupper()


def _users(file: PortFile, name: str) -> tuple[int, ...]:
    """Lines that use a name, but for its definition."""
    lines = {
        node.lineno
        for node in file.walk(ast.Name)
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
    }
    return tuple(sorted(lines))
