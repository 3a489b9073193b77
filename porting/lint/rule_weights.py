"""Rules about checkpoint conversion: ranks, tied weights, prefixes, precision."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .api import Entry
from .diagnostics import Finding, rule
from .source import Function, LocalFunction, PortClass, PortFile

_CONVERT = "convert_hf_to_neuron_state_dict"
_TIED = "update_state_dict_for_tied_weights"
_HIGH = ("float32", "float64", "float", "double")
_LOW = ("bfloat16", "float16", "half")


@rule("missing-rank", "warning", "the converted checkpoint has no rank numbers, which sharded attention reads")
def missing_rank(file: PortFile) -> Iterator[Finding]:
    """Conversions that never mention `rank`."""
    for cls in file.classes.values():
        method = cls.methods.get(_CONVERT)
        if method is None or not cls.derives_from("NeuronBaseForCausalLM"):
            continue
        if not any("rank" in text for text in _texts(cls.file, method, set())) and not _delegates(file, method):
            yield Finding(
                method,
                f"{cls.name}.{_CONVERT} sets no rank numbers: context, data and vocabulary parallelism read zeros",
                'add "rank_util.rank" and "layers.<i>.self_attn.rank_util.rank" = torch.arange(tp_degree, dtype=int32)',
            )


@rule("tied-weights-alias", "error", "tied weights share one tensor; sharding one of them corrupts the other")
def tied_weights_alias(file: PortFile) -> Iterator[Finding]:
    """Assignments of the embedding to the head without a copy."""
    for function in file.walk(ast.FunctionDef):
        assert isinstance(function, ast.FunctionDef)
        removed = set(_removed_keys(function))
        for node in file.within(function):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Subscript):
                continue
            target, source = node.targets[0], node.value
            if not isinstance(target, ast.Subscript) or ast.unparse(target.value) != ast.unparse(source.value):
                continue
            to, origin = _text(target.slice), _text(source.slice)
            if "lm_head" in to and "embed" in origin and origin not in removed:
                yield Finding(
                    node,
                    f"{to} and {origin} are one tensor after this",
                    "assign a copy: ....clone() (or .detach().clone())",
                )


@rule(
    "prefix-already-stripped", "warning", "a conversion reads keys with a prefix that was stripped before it was called"
)
def prefix_already_stripped(file: PortFile) -> Iterator[Finding]:
    """Reads of "model...." in a conversion whose class keeps the default prefix."""
    for cls in file.classes.values():
        method = cls.methods.get(_CONVERT)
        if method is None or not cls.derives_from("NeuronBaseForCausalLM") or _sets_prefix(cls):
            continue
        texts = [ast.unparse(node) for node in file.within(method) if isinstance(node, (ast.Call, ast.Compare))]
        if any("startswith" in text or "replace(" in text or " in " in text for text in texts if "model." in text):
            continue
        for node in file.within(method):
            if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
                continue
            if _text(node.slice).startswith("model."):
                yield Finding(
                    node,
                    f"key {_text(node.slice)!r}: the library strips 'model.' before it calls {_CONVERT}",
                    "leave the prefix out, or set _STATE_DICT_MODEL_PREFIX",
                )


@rule("copy-narrows", "warning", "copy_ rounds float32 values to the destination's dtype without a word")
def copy_narrows(file: PortFile) -> Iterator[Finding]:
    """`low.copy_(high)` where the precision of both is written down."""
    for scope in file.walk(ast.FunctionDef):
        assert isinstance(scope, ast.FunctionDef)
        dtypes = _dtypes(scope)
        for node in file.within(scope):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "copy_"):
                continue
            if file.function_around(node) is not scope or not node.args:
                continue
            source, target = _dtype(node.args[0], dtypes), _dtype(node.func.value, dtypes)
            if source in _HIGH and target in _LOW:
                yield Finding(
                    node,
                    f"{source} values are copied into a {target} tensor",
                    "make the destination float32, or round on purpose with .to()",
                )


def _texts(file: PortFile, function: Function, seen: set[str]) -> Iterator[str]:
    """Text constants and names of a function and of those it calls."""
    if function.name in seen:
        return
    seen.add(function.name)
    for node in file.within(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Call):
            thing = file.resolve(node.func)
            if isinstance(thing, LocalFunction):
                yield from _texts(thing.file, thing.node, seen)
            elif isinstance(node.func, ast.Attribute):
                owner = file.resolve(node.func.value)
                around = owner if isinstance(owner, PortClass) else file.class_around(node)
                found = around.own_method(node.func.attr) if around is not None else None
                if found is not None:
                    yield from _texts(found[0].file, found[1], seen)


def _delegates(file: PortFile, function: Function) -> bool:
    """Whether the conversion of another class, or a function of the library with the weights, does part of the work."""
    for node in file.within(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == _CONVERT:
            return True
        if isinstance(node, ast.Call):
            thing = file.resolve(node.func)
            if isinstance(thing, Entry) and thing.kind == "function" and "convert" in thing.name:
                return True
    return False


def _removed_keys(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Delete):
            yield from (_text(target.slice) for target in node.targets if isinstance(target, ast.Subscript))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "pop"
            and node.args
        ):
            yield _text(node.args[0])


def _sets_prefix(cls: PortClass) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == "_STATE_DICT_MODEL_PREFIX"
        for one in cls.lineage()
        if isinstance(one, PortClass)
        for node in one.file.within(one.node)
    )


def _text(node: ast.expr) -> str:
    """A text constant, or the constant parts of an f-string with `*` between them."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(item.value) if isinstance(item, ast.Constant) else "*" for item in node.values)
    return ast.unparse(node)


def _dtypes(scope: ast.FunctionDef) -> dict[str, str]:
    """Dtypes that assignments in a function write down."""
    found: dict[str, str] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            dtype = _dtype(node.value, found)
            if dtype:
                found[ast.unparse(node.targets[0])] = dtype
    return found


def _dtype(node: ast.expr, known: dict[str, str]) -> str:
    """The dtype that an expression writes down (`.float()`, `.to(torch.float32)`, `dtype=...`), or nothing."""
    text = ast.unparse(node)
    if text in known:
        return known[text]
    if isinstance(node, ast.Call):
        words = [*node.args, *(word.value for word in node.keywords if word.arg == "dtype")]
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in ("float", "double", "half", "bfloat16") and not node.args:
            return {"float": "float32", "double": "float64", "half": "float16"}.get(name, name)
        for word in words:
            leaf = ast.unparse(word).rpartition(".")[2]
            if leaf in (*_HIGH, *_LOW):
                return leaf
        if name in ("view", "reshape", "transpose", "narrow", "contiguous", "t") and isinstance(
            node.func, ast.Attribute
        ):
            return _dtype(node.func.value, known)
    if isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node, ast.Name):
        return _dtype(node.value, known) if text not in known else known[text]
    return ""
