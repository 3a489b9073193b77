"""The norms of a port: the device's kernel where its arithmetic is the model's, else plain operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ...store.errors import InputError
from ..spec.architecture import Architecture, Norm


def norm_constructor(norm: Norm, size: str, stem: str) -> str:
    """The expression that makes a norm."""
    if norm.kind == "layer" and norm.offset:
        raise InputError("unsupported: a layer norm with an offset on its weight has no block yet")
    if norm.kind == "layer":
        affine = "" if norm.weight else ", elementwise_affine=False"
        bias = "" if norm.bias or not norm.weight else ", bias=False"
        return f"nn.LayerNorm({size}, eps={norm.eps.expression}{affine}{bias})"
    if not norm.weight:
        raise InputError("unsupported: an RMS norm without weight has no block yet")
    made = "get_rmsnorm_cls()" if _is_kernel_norm(norm) else f"{stem}RMSNorm"
    return f"{made}({size}, eps={norm.eps.expression})"


def _is_kernel_norm(norm: Norm) -> bool:
    return norm.kind == "rms" and norm.offset == 0 and norm.rounding == "normalized"


def _all_norms(spec: Architecture) -> Iterator[Norm]:
    yield from (named.norm for named in spec.layer.norms)
    yield spec.head.norm
    if spec.attention.latent is not None:
        yield spec.attention.latent.norm
    if spec.attention.query_key_norm is not None:
        yield spec.attention.query_key_norm.norm


def norm_plan(spec: Architecture) -> dict[str, Any]:
    return plan_of_norms(_all_norms(spec))


def plan_of_norms(norms: Iterable[Norm]) -> dict[str, Any]:
    """Which class of its own a port needs for its norms: `define`, and if so its `kind` and `offset`."""
    rms = {(norm.offset, norm.rounding) for norm in norms if norm.kind == "rms"}
    if len(rms) > 1:
        raise InputError("unsupported: two kinds of RMS norm in one model have no block yet")
    if not rms:
        return {"define": False}
    (offset, rounding) = next(iter(rms))
    kernel = offset == 0 and rounding == "normalized"
    return {"define": True, "kind": "kernel" if kernel else "plain", "offset": offset}
