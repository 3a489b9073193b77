"""Rules about arithmetic that the library does differently from what a port may expect."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .diagnostics import Finding, rule
from .source import PortClass, PortFile

_ATTENTION = "NeuronAttentionBase"


@rule(
    "softmax-scale-multiplier",
    "error",
    "softmax_scale divides the scores; a multiplier makes attention nearly uniform or one-hot",
)
def softmax_scale_multiplier(file: PortFile) -> Iterator[Finding]:
    """Reciprocals given as softmax_scale."""
    for cls in file.classes.values():
        if not cls.derives_from(_ATTENTION):
            continue
        for node in cls.file.within(cls.node):
            value = _softmax_scale(node, own_forward="forward" in cls.methods or "scaled_qk" in cls.methods)
            if value is not None and _is_reciprocal(value):
                yield Finding(
                    value,
                    f"softmax_scale={ast.unparse(value)} is a factor, but scores are divided by softmax_scale",
                    "pass its reciprocal, for example math.sqrt(head_dim)",
                )


@rule("softmax-scale-ignored", "error", "the release's attention reads no softmax_scale, so setting it does nothing")
def softmax_scale_ignored(file: PortFile) -> Iterator[Finding]:
    """`self.softmax_scale = ...` in a release that always divides by the root of head_dim."""
    for cls in file.classes.values():
        if not cls.derives_from(_ATTENTION):
            continue
        if any("softmax_scale" in file.release.class_facts(base).get("attributes", ()) for base in cls.library_bases()):
            continue
        nodes = cls.file.within(cls.node)
        uses = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "softmax_scale"]
        if uses and all(isinstance(node.ctx, ast.Store) for node in uses):
            yield Finding(
                uses[0],
                f"attention of SDK {file.release.name} divides by sqrt(head_dim) whatever softmax_scale is",
                "scale the queries in prep_qkv_tensors, or require SDK 2.29, which takes softmax_scale",
            )


@rule(
    "swiglu-doubles-gate",
    "error",
    'glu_type="swiglu" multiplies by the gate itself; with silu that is gate * silu(gate)',
)
def swiglu_doubles_gate(file: PortFile) -> Iterator[Finding]:
    """`glu_type="swiglu"` in a port whose experts are not activated by a sigmoid."""
    settings = list(_settings(file))
    if any(name in ("hidden_act", "hidden_act_fn", "act_fn") and _word(value) == "sigmoid" for name, value in settings):
        return
    for name, value in settings:
        if name == "glu_type" and _word(value) == "swiglu":
            yield Finding(
                value,
                'glu_type="swiglu" computes up * gate * act(gate): right with act=sigmoid, wrong with silu',
                'leave glu_type at "glu" with silu, or set hidden_act to "sigmoid"',
            )


@rule(
    "fused-halves-stride",
    "error",
    "a sharded projection of two halves is split in two, but each rank holds no such halves",
)
def fused_halves_stride(file: PortFile) -> Iterator[Finding]:
    """ColumnParallelLinear of twice a size without stride=2, whose output is chunked."""
    for cls in file.classes.values():
        fused = dict(_doubled_projections(cls))
        for node in cls.file.within(cls.node) if fused else ():
            if not isinstance(node, ast.Call):
                continue
            name = _split_source(cls, node)
            if name in fused:
                yield Finding(
                    fused[name],
                    f"self.{name} holds two halves, and a rank gets a piece across both: the split mixes them up",
                    "pass stride=2, or use two projections",
                )


@rule("softmax-low-precision", "warning", "a softmax runs in the model's dtype, where the library uses float32")
def softmax_low_precision(file: PortFile) -> Iterator[Finding]:
    """`softmax(scores, dim=-1)` without a dtype in attention classes, unless its input was cast."""
    for cls in file.classes.values():
        if not cls.derives_from(_ATTENTION):
            continue
        for node in cls.file.within(cls.node):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "softmax"):
                continue
            text = ast.unparse(node)
            if "float32" in text or ".float()" in text or "dtype" in text or "manual_softmax" in text:
                continue
            if not _cast_before(cls, node):
                yield Finding(
                    node,
                    "softmax over attention scores without dtype=torch.float32",
                    "pass dtype=torch.float32 and cast back",
                )


def _softmax_scale(node: ast.AST, *, own_forward: bool) -> ast.expr | None:
    """The value that a node gives softmax_scale; an attribute counts only if the library's forward reads it."""
    if isinstance(node, ast.keyword) and node.arg == "softmax_scale" and not own_forward:
        return node.value
    if isinstance(node, ast.Assign) and not own_forward:
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr == "softmax_scale":
                return node.value
    return None


def _is_reciprocal(node: ast.expr) -> bool:
    """Whether a value is written as one over something, or is a small constant."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, float) and 0 < node.value < 1
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Pow):
            return _is_negative(node.right)
        if isinstance(node.op, ast.Div):
            return isinstance(node.left, ast.Constant) and not _is_reciprocal(node.right)
        if isinstance(node.op, ast.Mult):
            return _is_reciprocal(node.left) or _is_reciprocal(node.right)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "rsqrt":
            return True
        if name == "pow" and len(node.args) == 2:
            return _is_negative(node.args[1])
        if name == "float" and node.args:
            return _is_reciprocal(node.args[0])
    return False


def _is_negative(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _settings(file: PortFile) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of keyword arguments and of assignments to attributes."""
    for node in file.within(file.tree):
        if isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg, node.value
        elif isinstance(node, ast.Assign):
            yield from ((target.attr, node.value) for target in node.targets if isinstance(target, ast.Attribute))


def _word(node: ast.expr) -> str:
    """A text constant, or the last component of a name (`GLUType.SWIGLU`), in lower case."""
    return str(node.value if isinstance(node, ast.Constant) else ast.unparse(node).rpartition(".")[2]).lower()


def _doubled_projections(cls: PortClass) -> Iterator[tuple[str, ast.Call]]:
    """Attributes of a class that are column-parallel projections to twice a size, without stride=2."""
    for node in cls.file.within(cls.node):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        made = cls.file.resolve(node.value.func)
        if getattr(made, "name", "") != "ColumnParallelLinear":
            continue
        words = {word.arg: word.value for word in node.value.keywords}
        size = words.get("output_size", node.value.args[1] if len(node.value.args) > 1 else None)
        stride = words.get("stride")
        whole = words.get("gather_output")
        if size is None or not _is_doubled(size) or (isinstance(stride, ast.Constant) and stride.value == 2):
            continue
        if isinstance(whole, ast.Constant) and whole.value is True:
            continue
        yield from ((target.attr, node.value) for target in node.targets if isinstance(target, ast.Attribute))


def _is_doubled(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and any(isinstance(side, ast.Constant) and side.value == 2 for side in (node.left, node.right))
    )


def _split_source(cls: PortClass, node: ast.Call) -> str:
    """The attribute whose output a `chunk` or `split` call takes apart, or nothing."""
    if ast.unparse(node.func).rpartition(".")[2] not in ("chunk", "split", "tensor_split"):
        return ""
    bare = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in ("torch", "F")
    first = node.args[0] if node.args else None
    value = node.func.value if bare and isinstance(node.func, ast.Attribute) else first
    if isinstance(value, ast.Name):
        function = cls.file.function_around(node)
        assigned = [
            item.value
            for item in ast.walk(function or cls.node)
            if isinstance(item, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == value.id for target in item.targets)
        ]
        value = assigned[0] if assigned else value
    if (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and ast.unparse(value.func.value) == "self"
    ):
        return value.func.attr
    return ""


def _cast_before(cls: PortClass, node: ast.Call) -> bool:
    """Whether the softmax's input was cast to float32 in the same function."""
    function = cls.file.function_around(node)
    name = ast.unparse(node.args[0]) if node.args else ""
    return function is not None and any(
        isinstance(item, ast.Assign)
        and any(ast.unparse(target) == name for target in item.targets)
        and ("float32" in ast.unparse(item.value) or ".float()" in ast.unparse(item.value))
        for item in cls.file.within(function)
    )
