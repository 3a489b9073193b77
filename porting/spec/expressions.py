"""Which expression over the configuration a measured number is.

The small model's sizes and factors are distinct, so a number names its key. Expressions are tried from the most direct
on, and one that several keys explain goes to the key that the caller prefers; a number that none explains is no guess
but an error of the caller's, or a constant where the caller says that the class fixes it.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from ...store.errors import InputError
from .architecture import Number
from .evaluation import evaluate

_TOLERANCE = 1e-5


def visible(config: Any) -> SimpleNamespace:
    """What a port sees of a configuration: its stored keys and their aliases, no properties.

    Keys end up in the port's source, and they come from a file: one that is no plain name is left out.
    """
    names = [*getattr(config, "attribute_map", {}), *config.to_dict()]
    plain = [name for name in names if name.isidentifier() and not keyword.iskeyword(name) and name[0] != "_"]
    return SimpleNamespace(**{name: getattr(config, name) for name in plain if hasattr(config, name)})


class Expressions:
    """Expressions over a small configuration, evaluated for the full one."""

    def __init__(self, small: Any, full: Any) -> None:
        """Collect the numbers of the small configuration.

        Args:
            small: the configuration of the observed model.
            full: the configuration of the model to port.
        """
        self.small, self.full = visible(small), visible(full)
        aliased = set(getattr(small, "attribute_map", {}).values())
        self.keys = [name for name in vars(self.small) if name not in aliased]

    def value(self, expression: str, config: Any = None) -> Any:
        """What an expression is, by default for the full configuration."""
        return evaluate(expression, {"config": self.full if config is None else config})

    def number(self, expression: str) -> Number:
        """An expression as a number of the full configuration."""
        value = self.value(expression)
        if not _is_number(value):
            raise InputError(f"unsupported: {expression} is {value!r}, which is no number")
        return Number(expression, value)

    def find(self, measured: float, prefer: Sequence[str] = (), *, only: bool = False) -> Number | None:
        """The expression with a measured value in the small configuration, None when there is none.

        Args:
            measured: the value in the observed model.
            prefer: expressions tried first, in order; those that cannot be evaluated are passed over.
            only: try no others.
        """
        for expression in prefer:
            if self._is(expression, measured):
                return self.number(expression)
        if only:
            return None
        for expression in self._simple():
            if self._is(expression, measured):
                return self.number(expression)
        return None

    def _is(self, expression: str, measured: float) -> bool:
        try:
            value = self.value(expression, self.small)
            full = self.value(expression)
        except (AttributeError, TypeError, ZeroDivisionError, KeyError, OverflowError, ValueError):
            return False
        if not _is_number(value) or not _is_number(full):
            return False
        return math.isclose(value, measured, rel_tol=_TOLERANCE)

    def _simple(self) -> Iterator[str]:
        floats = [key for key in self.keys if isinstance(getattr(self.small, key, None), float)]
        integers = [key for key in self.keys if _is_integer(getattr(self.small, key, None))]
        for pattern in ("config.{}", "1 / config.{}", "config.{} ** -0.5", "config.{} ** 0.5"):
            for key in (*floats, *integers):
                yield pattern.format(key)

    def key_of(self, value: object, prefer: Sequence[str] = ()) -> str | None:
        """The first key whose value is `value`, preferred ones first."""
        for key in (*prefer, *self.keys):
            if getattr(self.small, key, None) == value and key in self.keys:
                return key
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
