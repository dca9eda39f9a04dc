"""The ops of ultrazoo once more, under names with a prefix, for kernels that only a test registers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from ultrazoo.ops import library
from ultrazoo.spec import OpSpec


def define(folder: str, prefix: str) -> list[OpSpec]:
    """Run ``ultrazoo/ops/<folder>/op.py`` again, with ``prefix`` before the name of every op that it defines.

    Schemas, fake kernels, autograd formulas and samples are those of the real ops.

    Returns:
        The module's specs, which call the ops of the new names.
    """
    original = importlib.import_module(f"ultrazoo.ops.{folder}.op")
    where = importlib.util.spec_from_file_location(f"{prefix}{folder}", original.__file__)
    assert where is not None and where.loader is not None
    module = importlib.util.module_from_spec(where)
    real: Callable[..., library.Op] = library.define

    def renamed(schema: str, *args: Any, **kwargs: Any) -> library.Op:
        return real(prefix + schema, *args, **kwargs)

    with mock.patch.object(library, "define", renamed):
        where.loader.exec_module(module)
    return [replace(spec, name=spec.name.replace("::", f"::{prefix}")) for spec in module.SPECS]


def forget(prefix: str) -> None:
    """Take the ops of a prefix out of ultrazoo's list."""
    for name in [name for name in library._ops if name.startswith(f"{library.NAMESPACE}::{prefix}")]:
        del library._ops[name]
