"""Keeping fp16 finite where a block multiplies activations with one another."""

from __future__ import annotations

import torch
from torch import Tensor


def saturate(x: Tensor) -> Tensor:
    """Bring fp16 overflow back to the largest finite number; other dtypes pass untouched.

    An overflow is harmless as the largest number of its row, and ends as NaN as soon as two of opposite sign meet.

    Args:
        x: any shape, without NaN.
    """
    if x.dtype is not torch.float16:
        return x
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit)
