"""Values that no module takes or returns: post-rotary queries and keys, attention scores, key-value caches.

They are recorded as port `tap` of the attention module, while the taps are in place:

    q_rope, k_rope   queries and keys after the rotary embedding, what attention multiplies (`b n s d`)
    scores           masked and scaled scores before the softmax, prefill only, when asked for (`b n s k`)
    weights          what the values are multiplied with, after the softmax, when asked for (`b n s k`)
    k_cache, v_cache the key-value cache read back after the step, at the positions of the step (`b n s d`)
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Emit = Callable[[str, str, torch.Tensor], None]

#: Slots of port `tap` in the order in which they appear.
TAPS = ("q_rope", "k_rope", "scores", "weights", "k_cache", "v_cache")
#: Methods of an attention that multiply weights and values last, and in how many products: those with the cache's
#: values, then those with the values of the step.
_WEIGHING = {"perform_prefill": 1, "compute_for_token_gen": 2}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")


@contextmanager
def attention_taps(model: torch.nn.Module, emit: Emit, *, scores: bool = False) -> Iterator[None]:
    """Report what attention modules compute inside their forward.

    Args:
        model: the model; modules with a method `prep_qkv_tensors` are its attentions.
        emit: called with the module's path, the slot and the tensor.
        scores: report attention scores and weights as well; they grow with the square of the length.
    """
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if hasattr(module, "prep_qkv_tensors"):
                stack.enter_context(_wrapped(module, "prep_qkv_tensors", _report_rope(path, emit)))
                if scores and hasattr(module, "scaled_qk"):
                    stack.enter_context(_wrapped(module, "scaled_qk", partial(emit, path, "scores")))
                for name, n in _WEIGHING.items():
                    if scores and hasattr(module, name):
                        stack.enter_context(_watched(module, name, n, partial(emit, path, "weights")))
        yield


def _report_rope(path: str, emit: Emit) -> Callable[[Any], None]:
    def report(prepared: Any) -> None:
        for slot, tensor in zip(("q_rope", "k_rope"), prepared, strict=False):
            if isinstance(tensor, torch.Tensor):
                emit(path, slot, tensor)

    return report


class _Products(TorchFunctionMode):
    """Keeps the left factors of the last matrix products."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left: deque[torch.Tensor] = deque(maxlen=count)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.left.append(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(module: torch.nn.Module, name: str, count: int, report: Callable[[Any], None]) -> Iterator[None]:
    """Replace a method of one instance by one that reports the left factors of its last products, joined by keys."""
    original = getattr(module, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        with _Products(count) as products:
            found = original(*args, **kwargs)
        if len(products.left) == count and all(left.ndim == 4 for left in products.left):
            report(torch.cat(tuple(products.left), dim=-1) if count > 1 else products.left[0])
        return found

    with _instead(module, name, method):
        yield


@contextmanager
def _wrapped(module: torch.nn.Module, name: str, report: Callable[[Any], None]) -> Iterator[None]:
    """Replace a method of one instance by one that also reports what it returns."""
    original = getattr(module, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        report(found)
        return found

    with _instead(module, name, method):
        yield


@contextmanager
def _instead(module: torch.nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give one instance another method."""
    module.__dict__[name] = method
    try:
        yield
    finally:
        del module.__dict__[name]


def attention_paths(model: torch.nn.Module) -> list[str]:
    """Path of the attention of every layer, in the order of the layers; the layer's own where it has none."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        layer = _LAYER.search(path)
        if layer is not None:
            found = [name for name, child in module.named_modules() if hasattr(child, "prep_qkv_tensors")]
            paths[int(layer[1])] = f"{path}.{found[0]}" if found and found[0] else path
    return [paths[number] for number in sorted(paths)]


def cache_tensors(output: Any, n_layers: int) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Layer, slot and tensor of the key-value caches that a model's root returns after its logits."""
    if not isinstance(output, (list, tuple)) or len(output) < 2 * n_layers:
        return
    caches = output[len(output) - 2 * n_layers :]
    for layer in range(n_layers):
        for slot, tensor in zip(("k_cache", "v_cache"), caches[2 * layer : 2 * layer + 2], strict=True):
            if isinstance(tensor, torch.Tensor):
                yield layer, slot, tensor
