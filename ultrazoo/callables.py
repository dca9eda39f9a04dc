"""Calls of functions that plugins hand over: an exception becomes one line with the file and line in their code."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrazoo.errors import ConfigError, PluginError, UltrazooError

if TYPE_CHECKING:
    from types import CodeType

    from pydantic import BaseModel
    from torch import nn

    from ultrazoo.spec import BlockSpec

Function = Callable[..., Any]
HERE = Path(__file__).parent
HARNESS = (Path(__file__), HERE / "testing", HERE / "bench", HERE / "cli")
"""Code of ultrazoo that calls blocks and ops: never the place of their errors."""
PASSED = (UltrazooError, MemoryError, RuntimeError)
"""Errors of a constructor that callers handle: clear ones, out of memory, and torch without the numbers of a tensor."""


def place_of(function: Function) -> str:
    """Return ``file:line`` of a function or of a module's ``forward``; the file of any other class."""
    code = _code_of(function)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else _file_of(function)


def place_in(error: BaseException, function: Function) -> str:
    """Return ``file:line`` of the innermost line of a function's package that led to an error.

    Args:
        error: With its traceback; what caused it comes first.
        function: Of the plugin; its own place is returned if no line of its package is in the traceback.
    """
    home = _package_of(Path(_file_of(function)))
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for each in reversed(chain):
        for frame in reversed(traceback.extract_tb(each.__traceback__)):
            path = Path(frame.filename)
            if path.is_relative_to(home) and not any(map(path.is_relative_to, HARNESS)):
                return f"{path}:{frame.lineno}"
    return place_of(function)


def in_one_line(error: BaseException) -> str:
    """Return what was raised, without line breaks; the message alone of an error of ultrazoo's own."""
    message = " ".join(str(error).split())
    if isinstance(error, UltrazooError):
        return message
    return f"raised {type(error).__name__}: {message}".rstrip(": ")


def failure(what: str, error: BaseException, function: Function) -> PluginError:
    """Return the error to raise for what a plugin's function raised."""
    place = place_in(error, function)
    return PluginError(f"{what}: {in_one_line(error)}{f' ({place})' if place else ''}")


def guard_call(function: Function, what: str, kind: type | None = None) -> Function:
    """Return the function with its exceptions, and a result of another type than ``kind``, as a ``PluginError``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except (UltrazooError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise failure(what, error, function) from error
        if kind is not None and not isinstance(result, kind):
            raise PluginError(f"{what}: returned {result!r}, expected {kind.__name__} ({place_of(function)})")
        return result

    return call


def guard_items(function: Function, what: str, kind: type) -> Callable[..., Iterator[Any]]:
    """Return the function as a generator, with its exceptions and items that are no ``kind`` as a ``PluginError``."""

    @functools.wraps(function)
    def items(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            given = function(*args, **kwargs)
            if not isinstance(given, Iterable):
                raise PluginError(f"{what}: returned {given!r}, expected {kind.__name__}s ({place_of(function)})")
            for item in given:
                if not isinstance(item, kind):
                    raise PluginError(f"{what}: gave {item!r}, expected {kind.__name__} ({place_of(function)})")
                yield item
        except (UltrazooError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise failure(what, error, function) from error

    return items


def construct(spec: BlockSpec, config: BaseModel) -> nn.Module:
    """Build the module of a block.

    Raises:
        ConfigError: It refuses its options by a ValueError.
        PluginError: It raises any other error that is no RuntimeError.
    """
    try:
        return spec.module(config)
    except PASSED:
        raise
    except ValueError as error:
        place = place_in(error, spec.module)
        raise ConfigError(f"block {spec.name!r}: {' '.join(str(error).split())} ({place})") from error
    except (Exception, SystemExit) as error:
        raise failure(f"block {spec.name!r}: its module", error, spec.module) from error


def _code_of(function: Any) -> CodeType | None:
    function = _plain(function)
    if isinstance(function, type):
        function = getattr(function, "forward", None)
    elif not hasattr(function, "__code__"):
        function = getattr(function, "__func__", type(function).__call__)
    code: CodeType | None = getattr(function, "__code__", None)
    return code


def _file_of(function: Any) -> str:
    function = _plain(function)
    code = None if isinstance(function, type) else _code_of(function)
    if code is not None:
        return code.co_filename
    module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
    return getattr(module, "__file__", None) or ""


def _plain(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _package_of(path: Path) -> Path:
    """Return the folder of the outermost package that a file belongs to, or the file itself."""
    if not (path.parent / "__init__.py").is_file():
        return path
    folder = path.parent
    while (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder
