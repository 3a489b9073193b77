"""What a normalisation module computes, decided by calling it."""

from __future__ import annotations

import copy

import torch

from ...store.errors import InputError
from .architecture import Norm, Number
from .expressions import Expressions
from .observation import source_line
from .sources import Sources
from .wiring import same

_EPS_ATTRIBUTES = ("variance_epsilon", "eps", "epsilon")
_EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
#: Inputs this small make epsilon as large as the variance.
_TINY = 1e-2
_ROWS = 5


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module may be a normalisation: its name says so and it has no children."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


@torch.no_grad()
def analyse_norm(
    module: torch.nn.Module, width: tuple[int, ...], numbers: Expressions, sources: Sources, field: str, where: str
) -> Norm:
    """Decide kind, offset, epsilon and rounding of a norm.

    Args:
        module: the norm.
        width: the shape of what it normalises, without batch and positions.
        numbers: expressions over the configuration.
        sources: receives where each field comes from.
        field: its field in the spec.
        where: its path in the model.

    Raises:
        InputError: it computes something else than an RMS or layer norm.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((float(getattr(module, name)) for name in _EPS_ATTRIBUTES if hasattr(module, name)), None)
    line = source_line(module, "rsqrt")
    inputs = torch.randn(_ROWS, *width, generator=torch.Generator().manual_seed(0))
    if eps is None:
        eps = _measured_eps(module, inputs)
    expected = [module(inputs), module(_TINY * inputs)]
    for kind in ("rms", "layer"):
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            found = [_reference(x, kind, eps, weight, bias, offset) for x in (inputs, _TINY * inputs)]
            if all(same(a, b) for a, b in zip(found, expected, strict=True)):
                rounding = _rounding(module, inputs, kind, eps, offset)
                number = numbers.find(eps, [f"config.{key}" for key in _EPS_KEYS], only=True) or Number(repr(eps), eps)
                sources.measured(field, f"{type(module).__name__} called on random input", line)
                sources.number(f"{field}.eps", number, line)
                return Norm(kind, number, offset, weight is not None, bias is not None, rounding)
    raise InputError(f"unsupported: {type(module).__name__} at {where} ({line}) is neither an RMS nor a layer norm")


def _measured_eps(module: torch.nn.Module, inputs: torch.Tensor) -> float:
    """Epsilon of a norm that does not name it, to two digits: what shrinks the output of a tiny input.

    With s^2 the mean square, large / tiny output = sqrt((t^2 s^2 + eps) / (t^2 (s^2 + eps))) for an input scaled by t.
    """
    wide = inputs.double() - inputs.double().mean(-1, keepdim=True)
    square = wide.pow(2).mean(-1, keepdim=True)
    ratio = (module(inputs).double() / module(_TINY * inputs).double()).pow(2).median(-1, keepdim=True).values
    found = float((_TINY**2 * square * (ratio - 1) / (1 - ratio * _TINY**2)).median())
    return float(f"{found:.1e}")


def _reference(
    x: torch.Tensor,
    kind: str,
    eps: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: float,
    rounding: str = "product",
) -> torch.Tensor:
    """The norm in FP32, rounded to the input's precision where `rounding` says."""
    if rounding == "native":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalized.to(x.dtype)
    if rounding == "normalized":
        result = (weight + offset if offset else weight) * normalized.to(x.dtype)
    else:
        result = (normalized * (weight.float() + offset)).to(x.dtype)
    return result if bias is None else result + bias


def _rounding(module: torch.nn.Module, inputs: torch.Tensor, kind: str, eps: float, offset: float) -> str:
    """Which order of operations gives the module's bits in BF16; `product` where none does exactly."""
    low = copy.deepcopy(module).to(torch.bfloat16)
    weight, bias = getattr(low, "weight", None), getattr(low, "bias", None)
    x = inputs.to(torch.bfloat16)
    expected = low(x)
    for rounding in (("native",) if kind == "layer" and not offset else ()) + ("normalized", "product"):
        if rounding == "native" and (weight is not None and weight.ndim > 1):
            continue
        found = _reference(x, kind, eps, weight, bias, offset, rounding)
        if found.dtype == expected.dtype and torch.equal(found, expected):
            return rounding
    return "product"
