"""The small part of Python that a spec's expressions are written in, evaluated without `eval`.

Keys of a configuration and specs come from files, so an expression is data: nothing but arithmetic, comparisons and
look-ups in what it is given can happen.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ...store.errors import InputError

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.Lt: operator.lt,
    ast.In: lambda item, items: item in items,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"int": int, "math.log": math.log, "math.sqrt": math.sqrt}


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression.

    Args:
        expression: numbers and texts, `+ - * / // % **`, `== < in not or`, `config.key`, `value[index]`, and calls of
            `int`, `math.log` and `math.sqrt`.
        names: values by name; attributes are those of namespaces alone.

    Raises:
        InputError: it holds anything else, or is no Python.
        AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError: as Python itself raises them.
    """
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise InputError(f"unsupported: {expression!r} is no expression: {error}") from error
    return _value(tree, names)


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Attribute(value=ast.Name(id=name), attr=key) if isinstance(names.get(name), SimpleNamespace):
            return getattr(names[name], key)
        case ast.Subscript(value=held, slice=index):
            return _value(held, names)[_value(index, names)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(value, names) for value in values)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, names))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.Call(func=function, args=[argument], keywords=[]) if ast.unparse(function) in _FUNCTIONS:
            return _FUNCTIONS[ast.unparse(function)](_value(argument, names))
    raise InputError(f"unsupported: {ast.unparse(node)!r} in an expression over the configuration")
