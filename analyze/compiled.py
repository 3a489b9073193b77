"""How loops are compiled, and the machine operations that numba does not offer.

Nothing is compiled on import; a function compiles at its first call (some seconds, once per machine: the result
is cached on disk). Every compiled function releases the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

MAGNITUDE = 0x7FFF_FFFF_FFFF_FFFF
"""Mask of a float64's bits without its sign."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Strict floating-point arithmetic, in the order written."""
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


def compiled_sum(function: _Function) -> _Function:
    """Sums may be reassociated, so that they vectorise; NaN and infinity keep their meaning."""
    flags = {"reassoc", "contract", "nsz", "arcp"}
    return cast(_Function, numba.njit(nogil=True, cache=True, fastmath=flags)(function))


def _bitcast(argument: Any, result: Any) -> Any:
    """A function that reinterprets the bits of a scalar."""

    def typing(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(argument), generate

    return intrinsic(typing)


as_float32 = _bitcast(types.uint32, types.float32)
as_float64 = _bitcast(types.int64, types.float64)
as_bits = _bitcast(types.float64, types.int64)


def _widening() -> Any:
    """A function of the bits of a float32 (uint32) or bfloat16 (uint16): the number as float64."""

    def typing(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word = context.get_value_type(types.uint32)
            bits = arguments[0]
            if signature.args[0] == types.uint16:
                bits = builder.shl(builder.zext(bits, word), word(16))
            single = builder.bitcast(bits, context.get_value_type(types.float32))
            return builder.fpext(single, context.get_value_type(types.float64))

        return types.float64(value), generate

    return intrinsic(typing)


widened = _widening()


def _accumulation(operands: int) -> Any:
    """A function that adds a number, or a product of two, to a sum, in whatever order vectorises best.

    Only this addition may be reassociated; a flag on the whole function would let `(b - r) - shift` become
    `b - (r + shift)`, which cancels.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, value = arguments[:2]
        if operands == 2:
            value = builder.fmul(value, arguments[2], flags=("contract",))
        return builder.fadd(total, value, flags=("reassoc", "contract", "nsz"))

    def one(typing_context: Any, total: Any, value: Any) -> Any:
        return types.float64(types.float64, types.float64), generate

    def two(typing_context: Any, total: Any, value: Any, factor: Any) -> Any:
        return types.float64(types.float64, types.float64, types.float64), generate

    return intrinsic(one if operands == 1 else two)


plus = _accumulation(1)
plus_product = _accumulation(2)


def _cache_hint() -> Any:
    """A function (array, element) that asks for a cache line without waiting for it."""

    def typing(typing_context: Any, array: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            word = context.get_value_type(types.int32)
            void = context.get_value_type(types.voidptr)
            address = builder.bitcast(builder.gep(pointer, [arguments[1]]), void)
            prefetch = builder.module.declare_intrinsic(
                "llvm.prefetch", [void], ir.FunctionType(ir.VoidType(), [void, word, word, word])
            )
            builder.call(prefetch, [address, word(0), word(2), word(1)])
            return context.get_dummy_value()

        return types.void(array, types.intp), generate

    return intrinsic(typing)


prefetch = _cache_hint()
