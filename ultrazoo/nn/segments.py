"""What blocks ask about ``segments``: 0 is padding, equal positive numbers are one document.

A document is one run of tokens, and its number does not return after another document. Padding may be anywhere, also
inside a document, whose real tokens then get what they get when the padding is cut out. The rule and its checks are in
``ultrazoo.ops.segments``; every function here raises its errors. ``None`` means that every row is one full document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.ops.segments import Gaps, checked, is_gap, shared

__all__ = ["Gaps", "checked", "mask_padding", "positions", "same_document", "shared", "starts"]


def starts(segments: Tensor) -> Tensor:
    """Mark the first token of each document, and padding between documents, so that a scan restarts there.

    Padding inside a document is not marked: a scan passes over it.

    Args:
        segments: (B, L) int64.

    Returns:
        (B, L) bool.
    """
    gaps = Gaps.of(segments)
    assert gaps.segments is not None
    marks = _starts(gaps.segments)
    return gaps.open(marks) & ~is_gap(segments) if gaps.move else marks


def _starts(segments: Tensor) -> Tensor:
    """``starts`` of segments without gaps."""
    changes = segments.ne(torch.roll(segments, 1, dims=1)) | segments.eq(0)
    first = torch.arange(segments.shape[1], device=segments.device).eq(0)
    return changes | first


def positions(segments: Tensor | None, length: int, device: torch.device | None = None) -> Tensor:
    """Count each real token from 0 at the start of its document, not counting padding; padding counts 0.

    Args:
        segments: (B, L) int64, or None.
        length: L, the tokens of a row.
        device: where the result lives when ``segments`` is None; otherwise it follows ``segments``.

    Returns:
        (B, L) int64, or (1, L) when ``segments`` is None.
    """
    if segments is None:
        return torch.arange(length, device=device).unsqueeze(0)
    gaps = Gaps.of(segments)
    assert gaps.segments is not None
    index = torch.arange(length, device=segments.device).expand_as(segments)
    if length == 0:
        return index
    start_index = torch.where(_starts(gaps.segments), index, 0)
    return gaps.open(index - start_index.cummax(dim=1).values)


def same_document(segments: Tensor) -> Tensor:
    """Tell for each pair of positions whether both are real tokens of one document.

    A padding position sees nothing and is seen by nothing, so its row of the mask is False throughout.

    Args:
        segments: (B, L) int64.

    Returns:
        (B, 1, L, L) bool; the third dimension is the query, the fourth the key.
    """
    segments = checked(segments)
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
