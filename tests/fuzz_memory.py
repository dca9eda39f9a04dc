"""Tensors in memory of their own, beside a page that cannot be accessed."""

from __future__ import annotations

import ctypes
import mmap
import random
from typing import Any

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(value: Any, rng: random.Random) -> Any:
    """Return a tensor's numbers in memory that ends, or begins, at a page without access; other values as they are.

    The layout is contiguous, or every second element of the last dimension, or a transposed one.
    """
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.numel() == 0:
        return value
    layout = rng.choice(("exact", "exact", "strided", "transposed"))
    at_end = rng.random() < 0.75
    if layout == "strided" and value.dim():
        place = block((*value.shape[:-1], 2 * value.shape[-1]), value.dtype, at_end)[..., 1::2]
    elif layout == "transposed" and value.dim() > 1:
        place = block((*value.shape[:-2], value.shape[-1], value.shape[-2]), value.dtype, at_end).mT
    else:
        place = block(tuple(value.shape), value.dtype, at_end)
    return place.copy_(value)


def block(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Return a tensor that fills memory up to, or from, a page without access."""
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = address + (pages * PAGE if at_end else 0)
    if _libc.mprotect(ctypes.c_void_p(guard), PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * PAGE - size if at_end else PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(dtype).view(shape)
