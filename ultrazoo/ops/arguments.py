"""Checks of the arguments of an op, before its reference runs; csrc/common/arguments.h is the same for the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST = torch.finfo(torch.float32).max
"""The largest number that kernels compute with."""


class Arguments:
    """Checks the arguments of one call.

    A shape is written in symbols, as in ``"B, L, H, K"``: the first tensor with a symbol sets its size, and the others
    must agree. ``...`` at the start stands for any number of dimensions, a number for itself.
    """

    def __init__(self, op: str, lead: Tensor) -> None:
        """Begin with no sizes known.

        Args:
            op: Full name, with which messages begin.
            lead: All tensors must be on its device.
        """
        self.op, self.device = op, lead.device
        self.sizes: dict[str, int] = {}
        self._leading: tuple[int, ...] | None = None

    def tensor(
        self, name: str, x: Tensor | None, shape: str, *dtypes: torch.dtype, devices: tuple[torch.device, ...] = ()
    ) -> None:
        """Check a tensor; an optional one may be None.

        Args:
            name: Name of the argument.
            x: The tensor.
            shape: Its shape in symbols.
            dtypes: The dtypes that it may have; none given: any floating-point dtype of 16, 32 or 64 bits.
            devices: Devices that it may be on besides that of the first argument.

        Raises:
            TypeError: The dtype does not fit.
            ValueError: The shape, the device or the layout does not fit.
        """
        if x is None:
            return
        if x.dtype not in (dtypes or FLOATING):
            raise TypeError(f"{self.op}: {name}: got {x.dtype}, expected {_either(dtypes)}")
        if x.layout != torch.strided:
            raise ValueError(f"{self.op}: {name}: got layout {x.layout}, expected {torch.strided}")
        if not self._match(x, shape):
            raise ValueError(f"{self.op}: {name}: got shape {tuple(x.shape)}, expected {self._described(shape)}")
        if x.device != self.device and x.device not in devices:
            raise ValueError(
                f"{self.op}: {name}: got {x.device}, expected {self.device}, the device of the first argument"
            )

    def number(self, name: str, value: float, least: float, most: float) -> None:
        """Check that a number is finite and within bounds.

        Raises:
            ValueError: It is not.
        """
        if not least <= value <= most:  # so NaN is refused
            bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
            if most == MOST and least == -MOST:
                bounds = "a finite float32"
            raise ValueError(f"{self.op}: {name}: got {value}, expected {bounds}")

    def _match(self, x: Tensor, shape: str) -> bool:
        """Whether a shape fits; the sizes of new symbols are kept if so."""
        symbols, sizes, known, leading = _symbols(shape), tuple(x.shape), dict(self.sizes), self._leading
        if symbols and symbols[0] == "...":
            symbols = symbols[1:]
            at = max(0, len(sizes) - len(symbols))
            leading, sizes = (sizes[:at] if leading is None else leading), sizes[at:]
            if leading != tuple(x.shape)[:at]:
                return False
        if len(sizes) != len(symbols):
            return False
        for symbol, n in zip(symbols, sizes, strict=True):
            if n != (int(symbol) if symbol.isdecimal() else known.setdefault(symbol, n)):
                return False
        self.sizes, self._leading = known, leading
        return True

    def _described(self, shape: str) -> str:
        """The shape, and what is known of its symbols."""
        known = [f"{symbol} {self.sizes[symbol]}" for symbol in _symbols(shape) if symbol in self.sizes]
        if shape.startswith("...") and self._leading is not None:
            known.insert(0, f"... {self._leading}")
        return f"({shape})" + (f" with {', '.join(known)}" if known else "")


def widest(op: str, **tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to which tensors are promoted together.

    Raises:
        TypeError: One is not of a floating-point dtype of 16, 32 or 64 bits.
    """
    dtype: torch.dtype | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in FLOATING:
            raise TypeError(f"{op}: {name}: got {x.dtype}, expected {_either(())}")
        dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    assert dtype is not None
    return dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums for a floating-point dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def document_numbers(op: str, segments: Tensor | None) -> Tensor | None:
    """Return ``segments`` in int64.

    Raises:
        TypeError: They are not integers.
    """
    if segments is None:
        return None
    if segments.is_floating_point() or segments.is_complex() or segments.dtype == torch.bool:
        raise TypeError(f"{op}: segments: got {segments.dtype}, expected integers; 0 is padding")
    return segments.to(torch.int64)


def _symbols(shape: str) -> list[str]:
    return shape.split(", ") if shape else []


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes)) or "a floating-point dtype of 16, 32 or 64 bits"
