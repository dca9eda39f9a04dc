"""Checks of the arguments of public functions; an error names the argument, what was got and what was expected."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

from ultrazoo.errors import ArgumentError, ArgumentTypeError

Item = TypeVar("Item")


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Return a whole number within its bounds.

    Raises:
        ArgumentTypeError: It is no whole number.
        ArgumentError: It is out of bounds.
    """
    bounds = f"at least {least}" if most is None else f"{least} to {most}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"{name}: got {reprlib.repr(value)}, expected a whole number, {bounds}")
    number = operator.index(value)
    if number < least or (most is not None and number > most):
        raise ArgumentError(f"{name}: got {number}, expected {bounds}")
    return number


def file_path(name: str, value: Any) -> Path:
    """Return a path.

    Raises:
        ArgumentTypeError: It is neither a str nor a path.
        ArgumentError: It is empty, or no system has such a path.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise ArgumentTypeError(f"{name}: got {reprlib.repr(value)}, expected a path, as a str or a pathlib.Path")
    text = os.fspath(value)
    if not text.strip() or "\0" in text:
        raise ArgumentError(f"{name}: got {text!r}, expected a path; write . for this directory")
    return Path(text)


def list_of(name: str, values: Iterable[Item], what: str) -> list[Item]:
    """Return several values as a list.

    Args:
        name: The argument.
        values: Anything that has the values in order; one str is not taken apart into its characters.
        what: What the values are, in the plural.

    Raises:
        ArgumentTypeError: It is one value, or has no order.
    """
    if isinstance(values, (str, bytes, os.PathLike)):
        raise ArgumentTypeError(
            f"{name}: got one {type(values).__name__}, {reprlib.repr(values)}, expected a list of {what}; pass a list, "
            "also for one"
        )
    if isinstance(values, (Mapping, Set)) or not isinstance(values, Iterable):
        raise ArgumentTypeError(f"{name}: got {type(values).__name__}, expected a list of {what}")
    return list(values)
