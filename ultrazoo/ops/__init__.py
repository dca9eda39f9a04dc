"""The public ops; each is imported, and torch with it, when it is first named."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrazoo.ops.attention.op import attention
    from ultrazoo.ops.bitlinear.op import bitlinear, bitlinear_packed, pack_ternary
    from ultrazoo.ops.dropout.op import dropout
    from ultrazoo.ops.library import OpLibrary, kernel_policy, kernel_status, set_kernel_policy
    from ultrazoo.ops.prepare import prepare, prepare_blocks
    from ultrazoo.ops.retention.op import retention
    from ultrazoo.ops.rk4.op import rk4_combine, rk4_stage
    from ultrazoo.ops.selective_scan.op import selective_scan

_HOMES = {
    "OpLibrary": "library",
    "attention": "attention.op",
    "bitlinear": "bitlinear.op",
    "bitlinear_packed": "bitlinear.op",
    "dropout": "dropout.op",
    "kernel_policy": "library",
    "kernel_status": "library",
    "pack_ternary": "bitlinear.op",
    "prepare": "prepare",
    "prepare_blocks": "prepare",
    "retention": "retention.op",
    "rk4_combine": "rk4.op",
    "rk4_stage": "rk4.op",
    "selective_scan": "selective_scan.op",
    "set_kernel_policy": "library",
}

__all__ = [
    "OpLibrary",
    "attention",
    "bitlinear",
    "bitlinear_packed",
    "dropout",
    "kernel_policy",
    "kernel_status",
    "pack_ternary",
    "prepare",
    "prepare_blocks",
    "retention",
    "rk4_combine",
    "rk4_stage",
    "selective_scan",
    "set_kernel_policy",
]


class _Ops(types.ModuleType):
    """Keeps ``ultrazoo.ops.retention`` the function once the folder of that name is imported too."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Ops
