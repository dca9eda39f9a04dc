"""Dropout in plain torch, with the very mask of the kernels.

Element e, in the order of the indices, has the 16 bits of slot (e % 128) // 16 of the Philox block whose counter is
(e // 128) * 16 + e % 16: the draws of 16 consecutive elements stand in one slot of 16 consecutive blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.ops.philox import LOW, philox, slots

GROUP, BLOCKS = 128, 16


def dropout_mask(shape: torch.Size, seed: Tensor, keep: int, device: torch.device) -> Tensor:
    """Tell which elements are kept.

    Args:
        shape: Of the mask.
        seed: 0-dim int64.
        keep: Probability in 65536ths.
        device: Of the mask.

    Returns:
        (shape) bool.
    """
    elements = shape.numel()
    block = torch.arange(-(-elements // GROUP) * BLOCKS, device=device)
    zero = torch.zeros_like(block)
    draws = slots(philox((block & LOW, block >> 32, zero, zero), seed.to(device)))  # (8, groups * 16)
    order = draws.unflatten(1, (-1, BLOCKS)).transpose(0, 1).reshape(-1)  # group, slot, block
    return (order[:elements] < keep).reshape(shape)


def dropout_reference(x: Tensor, seed: Tensor, keep: int) -> Tensor:
    """x * 65536 / keep where the mask keeps it, else 0."""
    mask = dropout_mask(x.shape, seed, keep, x.device)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, wide * (65536 / keep), 0).to(x.dtype).contiguous()
