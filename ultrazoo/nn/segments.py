"""What ``segments`` means, in one place: 0 is padding, equal positive numbers are one document.

Documents are contiguous in a row and padding may stand anywhere. ``None`` means that every row is one full document.
"""

from __future__ import annotations

import torch
from torch import Tensor


def starts(segments: Tensor) -> Tensor:
    """Mark the first token of each document, and every padding position, so that a scan restarts there.

    Args:
        segments: (B, L) int64.

    Returns:
        (B, L) bool.
    """
    changes = segments.ne(torch.roll(segments, 1, dims=1)) | segments.eq(0)
    first = torch.arange(segments.shape[1], device=segments.device).eq(0)
    return changes | first


def positions(segments: Tensor | None, length: int, device: torch.device | None = None) -> Tensor:
    """Count each token from 0 at the start of its document; padding counts 0.

    Args:
        segments: (B, L) int64, or None.
        length: L, the tokens of a row.
        device: where the result lives when ``segments`` is None; otherwise it follows ``segments``.

    Returns:
        (B, L) int64, or (1, L) when ``segments`` is None.
    """
    if segments is None:
        return torch.arange(length, device=device).unsqueeze(0)
    index = torch.arange(length, device=segments.device).expand_as(segments)
    if length == 0:
        return index
    start_index = torch.where(starts(segments), index, 0)
    return index - start_index.cummax(dim=1).values


def same_document(segments: Tensor) -> Tensor:
    """Tell for each pair of positions whether both are real tokens of one document.

    A padding position sees nothing and is seen by nothing, so its row of the mask is False throughout.

    Args:
        segments: (B, L) int64.

    Returns:
        (B, 1, L, L) bool; the third dimension is the query, the fourth the key.
    """
    equal = segments.unsqueeze(2).eq(segments.unsqueeze(1))
    return (equal & segments.ne(0).unsqueeze(2)).unsqueeze(1)


def mask_padding(x: Tensor, segments: Tensor | None) -> Tensor:
    """Write zeros over padding positions, whatever stood there; ``x`` itself when ``segments`` is None.

    Args:
        x: (B, L, ...).
        segments: (B, L) int64, or None.
    """
    if segments is None:
        return x
    padding = segments.eq(0).reshape(segments.shape + (1,) * (x.dim() - 2))
    return x.masked_fill(padding, 0)
