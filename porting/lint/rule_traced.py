"""Rules about code that is traced into the compiled graph: one graph serves every rank and every input."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .api import Entry
from .diagnostics import Finding, rule
from .source import Function, Name, PortClass, PortFile

_COLLECTIVES = frozenset(
    (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "broadcast",
        "scatter",
        "gather",
        "all_to_all",
        "all_to_all_single",
        "send",
        "recv",
        "isend",
        "irecv",
        "barrier",
    )
)
_RANKS = frozenset(
    (
        "get_rank",
        "get_tensor_model_parallel_rank",
        "get_expert_model_parallel_rank",
        "get_pipeline_model_parallel_rank",
        "get_data_parallel_rank",
        "get_context_model_parallel_rank",
        "get_ordinal",
    )
)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NEURON_RANK_ID")
_TO_HOST = ("item", "tolist", "numpy")
_REDUCTIONS = ("any", "all", "equal", "allclose", "is_nonzero")
_POSITIONS = ("position_ids", "seq_ids", "cache_position", "input_ids", "rotary_position_ids")


@rule(
    "distributed-in-forward",
    "error",
    "torch.distributed is called in traced code; the compiled graph has no such group",
)
def distributed_in_forward(file: PortFile) -> Iterator[Finding]:
    """Collectives of torch.distributed in traced methods."""
    for _, method in _traced(file):
        for node in file.within(method):
            if isinstance(node, ast.Call) and _torch_distributed(file, node) in _COLLECTIVES:
                yield Finding(
                    node,
                    f"{ast.unparse(node.func)} runs while tracing, not on the device",
                    "use neuronx_distributed.parallel_layers.mappings: reduce_from_tensor_model_parallel_region",
                )


@rule("python-rank", "error", "a rank read in Python is baked into the one graph that all ranks run")
def python_rank(file: PortFile) -> Iterator[Finding]:
    """Ranks read from process groups or the environment in modules."""
    for cls, method in _traced(file, construct=True):
        for node in file.within(method):
            text = _python_rank(file, node)
            if text:
                yield Finding(
                    node,
                    f"{text} in {cls.name}.{method.name}: every rank gets the number of the one that traced",
                    "use self.rank_util = SPMDRank(world_size=...) and its get_rank(), a tensor",
                )


@rule("narrow-tensor-start", "error", "narrow or a slice starts at a tensor's value, which tracing freezes")
def narrow_tensor_start(file: PortFile) -> Iterator[Finding]:
    """`narrow` with a start that is a tensor."""
    for _, method in _traced(file):
        tensors = _rank_tensors(method)
        for node in file.within(method):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "narrow"):
                continue
            place = 2 if isinstance(file.resolve(node.func), Name) else 1
            start = node.args[place] if len(node.args) > place else None
            start = next((word.value for word in node.keywords if word.arg == "start"), start)
            if start is not None and _is_tensor(start, tensors):
                yield Finding(
                    node,
                    f"narrow starts at {ast.unparse(start)}, a tensor: the traced value is used for every input",
                    "gather with torch.index_select or torch.gather and computed indices",
                )


@rule("host-value-in-forward", "error", "traced code takes a tensor's value to the host, which tracing freezes")
def host_value_in_forward(file: PortFile) -> Iterator[Finding]:
    """`.item()`, `.tolist()`, `.numpy()` in traced methods."""
    for cls, method in _traced(file):
        for node in file.within(method):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TO_HOST:
                if node.args or file.is_guarded(node) or _is_eager_only(file, node):
                    continue
                yield Finding(
                    node,
                    f"{ast.unparse(node.func)}() in {cls.name}.{method.name} is evaluated once, while tracing",
                    "compute with tensors: torch.where, index_select, masks",
                )


@rule("tensor-branch", "error", "traced code branches on a tensor's value; only one branch is compiled")
def tensor_branch(file: PortFile) -> Iterator[Finding]:
    """`if tensor.any():` in traced methods."""
    for cls, method in _traced(file):
        for node in file.within(method):
            if not isinstance(node, (ast.If, ast.While, ast.IfExp)) or _is_eager_only(file, node.test):
                continue
            if call := _reduction(node.test):
                yield Finding(
                    node,
                    f"the branch on {call} in {cls.name}.{method.name} is decided while tracing",
                    "use torch.where on both results",
                )


@rule(
    "silent-except",
    "warning",
    "an exception is swallowed: a failed conversion or forward pass goes on with wrong values",
)
def silent_except(file: PortFile) -> Iterator[Finding]:
    """Handlers that do nothing, in modules and conversions."""
    for node in file.walk(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException", "KeyError")
        empty = all(isinstance(item, (ast.Pass, ast.Continue)) for item in node.body)
        if broad and empty and file.class_around(node) is not None:
            yield Finding(
                node,
                "an exception is caught and nothing is done about it",
                "let it surface, or handle what is expected by name",
            )


def _traced(file: PortFile, *, construct: bool = False) -> Iterator[tuple[PortClass, Function]]:
    """Methods that run while the graph is traced: `forward` of modules and what it calls in the same class.

    Args:
        file: the file.
        construct: constructors too, which run before tracing but fill the modules that are traced.
    """
    for cls in file.classes.values():
        if not cls.is_module or cls.derives_from("NeuronApplicationBase", "ModelWrapper"):
            continue
        if any(
            "Application" in one.text or "ModelWrapper" in one.text
            for one in cls.lineage()
            if isinstance(one, (Entry, Name))
        ):
            continue
        reached: dict[str, Function] = {}
        queue = [
            "forward",
            "get_model_output",
            *(["__init__", "init_model", "setup_attr_for_model"] if construct else []),
        ]
        queue += [name for name in cls.methods if not name.startswith("__") and _overrides(cls, name)]
        while queue:
            name = queue.pop()
            if name in reached or name not in cls.methods or name in _HOST_METHODS:
                continue
            reached[name] = cls.methods[name]
            queue += [
                node.func.attr
                for node in cls.file.within(cls.methods[name])
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "self"
            ]
        yield from ((cls, method) for method in reached.values())


#: Methods of modules that run on the host, before anything is traced.
_HOST_METHODS = frozenset(
    {"preshard_hook", "load_state_dict", "_load_from_state_dict", "reset_parameters", "init_weights"}
)


def _overrides(cls: PortClass, name: str) -> bool:
    return name not in ("init_model", "setup_attr_for_model") and any(
        cls.file.release.method(base, name) for base in cls.library_bases()
    )


def _is_eager_only(file: PortFile, node: ast.AST) -> bool:
    """Whether a node is behind a condition that tells tracing from running."""
    while (parent := file.parents.get(node)) is not None:
        test = getattr(parent, "test", parent if isinstance(parent, ast.BoolOp) else None)
        if test is not None and any(word in ast.unparse(test) for word in ("is_tracing", "cpu_mode", "on_cpu")):
            return True
        node = parent
    return False


def _torch_distributed(file: PortFile, call: ast.Call) -> str:
    thing = file.resolve(call.func)
    if isinstance(thing, Name) and thing.text.startswith("torch.distributed."):
        return thing.text.rpartition(".")[2]
    return ""


def _python_rank(file: PortFile, node: ast.AST) -> str:
    """How a node reads a rank in Python, or nothing."""
    if isinstance(node, ast.Call):
        thing = file.resolve(node.func)
        if isinstance(thing, (Name, Entry)) and thing.text.rpartition(".")[2] in _RANKS:
            return f"{ast.unparse(node.func)}()"
        if isinstance(thing, Name) and thing.text in ("os.environ.get", "os.getenv") and node.args:
            name = node.args[0]
            return f"variable {name.value}" if isinstance(name, ast.Constant) and name.value in _RANK_VARIABLES else ""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in _RANK_VARIABLES:
        return f"variable {node.slice.value}"
    return ""


def _rank_tensors(method: Function) -> set[str]:
    """Names of a method that hold tensors for certain: ranks, and positions among its parameters."""
    names = {item.arg for item in (*method.args.args, *method.args.kwonlyargs) if item.arg in _POSITIONS}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_tensor(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _is_tensor(node: ast.expr, known: set[str]) -> bool:
    """Whether an expression is a tensor for certain: made of known ones by arithmetic, indexing or reductions."""
    if isinstance(node, ast.Name):
        return node.id in known
    if isinstance(node, ast.BinOp):
        return _is_tensor(node.left, known) or _is_tensor(node.right, known)
    if isinstance(node, ast.Subscript):
        return not ast.unparse(node).endswith("]") or (
            not ast.unparse(node.value).endswith("shape") and _is_tensor(node.value, known)
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if ast.unparse(node.func).endswith("rank_util.get_rank"):
            return True
        if node.func.attr in ("size", "dim", "numel", "item"):
            return False
        return _is_tensor(node.func.value, known)
    return False


def _reduction(test: ast.expr) -> str:
    """The part of a condition that reduces a tensor to a truth value, or nothing."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _REDUCTIONS:
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in ("np", "numpy", "math"):
                continue
            return f"{ast.unparse(node)}"
    return ""
