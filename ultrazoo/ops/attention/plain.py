"""Attention by torch's own operators: what a device without a kernel runs, and the yardstick for speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_softmax(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, dropout: float, scale: float, prefix: int
) -> Tensor:
    """Softmax attention by scaled_dot_product_attention, 0 at padding; arguments and result as ``attention``."""
    mask = None
    if segments is not None:  # padding sees padding, so that no row is empty
        mask = F.pad(segments[:, None, :, None].eq(segments[:, None, None]), (prefix, 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in _without_padding(q, k, v, segments, prefix))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return _zero_padding(o.transpose(1, 2), segments, 0).contiguous()


def plain_sigmoid(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, dropout: float, scale: float, prefix: int
) -> Tensor:
    """Sigmoid attention with the whole matrix of scores, in their dtype; arguments and result as ``attention``."""
    q, k, v = (x.transpose(1, 2) for x in _without_padding(q, k, v, segments, prefix))
    # in place from here to the weights: autograd keeps one (B, H, L, P + L), the weights themselves
    scores = (q * scale) @ k.transpose(-1, -2)
    if segments is None:
        scores.sub_(math.log(max(1, k.shape[2])))
    else:
        mask = F.pad(segments[:, None, :, None].eq(segments[:, None, None]), (prefix, 0), value=True)
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores.sub_(mask.sum(-1, keepdim=True).to(wide).log()).masked_fill_(~mask, -torch.inf)
    weights = scores.sigmoid_()
    o = (F.dropout(weights, dropout) if dropout else weights) @ v
    return _zero_padding(o.transpose(1, 2), segments, 0).contiguous()


def _without_padding(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _zero_padding(q, segments, 0), _zero_padding(k, segments, prefix), _zero_padding(v, segments, prefix)


def _zero_padding(x: Tensor, segments: Tensor | None, prefix: int) -> Tensor:
    if segments is None:
        return x
    return x.masked_fill(F.pad(segments.eq(0), (prefix, 0))[:, :, None, None], 0)
