"""Watching a small model run: what every module takes and returns, and what attention multiplies.

The analysis explains these values. What it cannot explain it does not understand, and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "__rmatmul__")


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: of the module.
        module: the module itself.
        inputs: tensors it was given, positional ones first, then by keyword.
        outputs: tensors it returned, those of tuples in order.
        order: position among all calls, by when the call began.
    """

    path: str
    module: Any
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    order: int

    @property
    def input(self) -> torch.Tensor:
        """The first tensor it was given."""
        return self.inputs[0]

    @property
    def output(self) -> torch.Tensor:
        """The first tensor it returned."""
        return self.outputs[0]


@dataclass(frozen=True)
class Softmax:
    """What surrounds a softmax: the product whose result is normalised, and the product that uses it.

    Attributes:
        path: of the innermost module that computed it.
        left: queries as multiplied.
        right: keys as multiplied, features before positions.
        scores: what is normalised, scaled and masked.
        values: what the result multiplies, None when nothing did.
        mixed: the result of that product.
    """

    path: str
    left: torch.Tensor
    right: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor | None = None
    mixed: torch.Tensor | None = None


@dataclass(frozen=True)
class Observation:
    """One forward pass of a model.

    Attributes:
        model: the model.
        config: its configuration.
        tokens: token ids it was given.
        calls: calls of all modules in order.
        softmaxes: by the path of the module that computed them.
        logits: what it returned.
    """

    model: Any
    config: Any
    tokens: torch.Tensor
    calls: tuple[Call, ...]
    softmaxes: dict[str, list[Softmax]]
    logits: torch.Tensor

    def calls_of(self, path: str) -> list[Call]:
        """Calls of one module."""
        return [call for call in self.calls if call.path == path]

    def call(self, path: str) -> Call:
        """The only call of a module."""
        found = self.calls_of(path)
        assert len(found) == 1, f"{path} was called {len(found)} times"
        return found[0]

    def children(self, path: str) -> list[Call]:
        """Calls of the direct children of a module, in order."""
        depth = path.count(".") + 1 if path else 0
        inside = f"{path}." if path else ""
        return [c for c in self.calls if c.path != path and c.path.startswith(inside) and c.path.count(".") == depth]

    def inside(self, path: str) -> list[Call]:
        """Calls of everything inside a module, in order."""
        return [call for call in self.calls if call.path.startswith(f"{path}.")]


@torch.no_grad()
def observe(model: torch.nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> Observation:
    """Run a model once and keep what its modules saw.

    Args:
        model: a language model that attends with plain operators ("eager").
        tokens: token ids, (batch, length).
        inputs: further inputs, for example `decoder_input_ids`.
    """
    watcher = _Watcher()
    with watcher.on(model):
        output = model(input_ids=tokens, use_cache=False, **inputs)
    calls = tuple(sorted(watcher.calls, key=lambda call: call.order))
    return Observation(model, model.config, tokens, calls, watcher.functions.found, output.logits)


@dataclass
class _Watcher:
    calls: list[Call] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    started: int = 0
    pending: list[tuple[int, tuple[torch.Tensor, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.functions = _Functions(self.stack)

    @contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in model.named_modules(remove_duplicate=False):
                before = module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
                after = module.register_forward_hook(partial(self._leave, path))
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(self.functions)
            yield

    def _enter(self, path: str, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(path)
        self.pending.append((self.started, tuple(t.clone() for t in _tensors((args, kwargs)))))
        self.started += 1

    def _leave(self, path: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        order, inputs = self.pending.pop()
        self.calls.append(Call(path, module, inputs, tuple(t.clone() for t in _tensors(output)), order))


class _Functions(TorchFunctionMode):
    """Notes the products around every softmax over four-dimensional scores."""

    def __init__(self, stack: Sequence[str]) -> None:
        super().__init__()
        self._stack = stack
        self._last: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.found: dict[str, list[Softmax]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        path = self._stack[-1] if self._stack else ""
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and isinstance(result, torch.Tensor):
            self._product(path, name, args, result)
        elif name == "softmax" and path in self._last:
            left, right = self._last[path]
            self.found.setdefault(path, []).append(Softmax(path, left, right, args[0].clone()))
        return result

    def _product(self, path: str, name: str, args: Any, result: torch.Tensor) -> None:
        factors = [value for value in args if isinstance(value, torch.Tensor)][-2:]
        if len(factors) < 2:
            return
        left, right = (factor.clone() for factor in factors)
        open_ones = self.found.get(path, [])
        if (
            open_ones
            and open_ones[-1].values is None
            and left.shape[-1]
            in (
                open_ones[-1].scores.shape[-1],
                open_ones[-1].scores.shape[-1] - 1,
            )
        ):
            last = open_ones[-1]
            open_ones[-1] = Softmax(path, last.left, last.right, last.scores, right, result.clone())
        else:
            self._last[path] = (left, right)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def source_line(module: torch.nn.Module | type, text: str) -> str:
    """Where in its class's forward a module mentions something, as `transformers/.../file.py:LINE`.

    The line of the class where the text does not occur, empty where there is no source.
    """
    kind = module if isinstance(module, type) else type(module)
    for scope in (getattr(kind, "forward", None), kind):
        try:
            lines, first = inspect.getsourcelines(scope) if scope is not None else ([], 0)
        except (OSError, TypeError):
            continue
        for offset, line in enumerate(lines):
            if text in line:
                return f"{_file_of(kind)}:{first + offset}"
    try:
        return f"{_file_of(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):
        return ""


def _file_of(kind: type) -> str:
    path = Path(inspect.getsourcefile(kind) or "")
    parts = path.parts
    return "/".join(parts[parts.index("transformers") :]) if "transformers" in parts else path.name
