"""Attention in plain torch, with whole matrices of scores: what the kernels compute, and with which dropout.

o_n = sum_m w_nm v_m / keep over the kept keys m, w_nm = softmax_m(scale q_n . k_m), or sigmoid(scale q_n . k_m - log M)
with M the number of keys that query n sees: the first P ones, and those of its document. q (B, L, H, K), k
(B, P + L, H, K), v (B, P + L, H, V), segments (B, L) with 0 at padding. Everything is computed in fp32, or in fp64 for
fp64 inputs, and rounded once.

Dropout draws for a query and a key the 16 bits of slot i % 8 of the Philox block (j, n - i % 8, b H + h, 1): i is the
place of the query in its document, n in its row without gaps, and j that of the key in its document, after the prefix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultrazoo.ops.philox import philox, slots
from ultrazoo.ops.segments import Gaps

SLOTS = 8


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    seed: Tensor,
    keep: int,
    scale: float,
    prefix: int,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """Weigh the values.

    Returns:
        o (B, L, H, V), contiguous, in the dtype of q; and log2 sum_m exp(scale q_n . k_m), (B, H, L) in fp32 or wider,
        0 at padding, for the tokens without gaps; (0, H, L) for the sigmoid, which has no use for it.
    """
    gaps = Gaps.of(segments)
    q, k, v = gaps.close(q), _close(gaps, k, prefix), _close(gaps, v, prefix)
    with torch.autocast(q.device.type, enabled=False):
        rows = _Rows(q, k, v, gaps.segments, prefix)
        weights, lse = rows.weights(scale, sigmoid)
        lse = lse / math.log(2)
        if keep < 65536:
            weights = rows.dropped(weights, seed, keep)
        o = torch.einsum("bhnm,bmhv->bnhv", weights, rows.v)
    return gaps.open(o.to(q.dtype).contiguous()), lse


def attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    segments: Tensor | None,
    seed: Tensor,
    keep: int,
    scale: float,
    prefix: int,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; o and lse, which the kernels read, are computed again."""
    gaps = Gaps.of(segments)
    grad, q, k, v = gaps.close(grad), gaps.close(q), _close(gaps, k, prefix), _close(gaps, v, prefix)
    with torch.autocast(q.device.type, enabled=False):
        rows = _Rows(q, k, v, gaps.segments, prefix)
        grad = rows.real(grad)
        weights, _ = rows.weights(scale, sigmoid)
        p = torch.einsum("bnhv,bmhv->bhnm", grad, rows.v)
        kept = weights
        if keep < 65536:
            p, kept = rows.dropped(p, seed, keep), rows.dropped(weights, seed, keep)
        ds = weights * (1 - weights) * p if sigmoid else weights * (p - (weights * p).sum(-1, keepdim=True))
        dq = scale * torch.einsum("bhnm,bmhk->bnhk", ds, rows.k)
        dk = scale * torch.einsum("bhnm,bnhk->bmhk", ds, rows.q)
        dv = torch.einsum("bhnm,bnhv->bmhv", kept, grad)
    dq, dk, dv = dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
    return gaps.open(dq), _open(gaps, dk, prefix), _open(gaps, dv, prefix)


def _close(gaps: Gaps, x: Tensor, prefix: int) -> Tensor:
    """x (B, P + L, H, K) with the gaps behind its prefix closed."""
    return torch.cat((x[:, :prefix], gaps.close(x[:, prefix:])), dim=1) if gaps.move else x


def _open(gaps: Gaps, x: Tensor, prefix: int) -> Tensor:
    """Undo ``_close``."""
    return torch.cat((x[:, :prefix], gaps.open(x[:, prefix:])), dim=1) if gaps.move else x


class _Rows:
    """q, k and v in the computing dtype, 0 at padding, and which keys each query sees."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, prefix: int) -> None:
        self.segments, self.prefix = segments, prefix
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = self.real(q), self.real(k), self.real(v)
        documents = torch.ones(q.shape[:2], dtype=torch.int64, device=q.device) if segments is None else segments
        self.documents = documents
        real = documents.ne(0)
        own = documents[:, :, None].eq(documents[:, None]) & real[:, :, None]
        first = real[:, :, None].expand(-1, -1, prefix)
        self.seen = torch.cat((first, own), dim=2)[:, None]  # (B, 1, L, P + L)

    def real(self, x: Tensor) -> Tensor:
        """x in the computing dtype, 0 at padding; the prefix of keys and values has none."""
        x = x.to(self.wide)
        if self.segments is None:
            return x
        padding = self.segments.eq(0)
        padding = torch.cat((padding.new_zeros(x.shape[0], x.shape[1] - padding.shape[1]), padding), dim=1)
        return x.masked_fill(padding[:, :, None, None], 0)

    def weights(self, scale: float, sigmoid: bool) -> tuple[Tensor, Tensor]:
        """Weights (B, H, L, P + L), 0 for what a query does not see, and the logarithm of the softmax's sum."""
        scores = torch.einsum("bnhk,bmhk->bhnm", self.q * scale, self.k)
        if sigmoid:
            bias = self.seen.sum(-1, keepdim=True).clamp_min(1).to(self.wide).log()
            lse = scores.new_empty(0, *scores.shape[1:3])
            return (scores - bias).sigmoid().masked_fill(~self.seen, 0), lse
        lse = scores.masked_fill(~self.seen, -torch.inf).logsumexp(-1)
        lse = lse.masked_fill(~self.seen.any(-1), 0)
        return (scores - lse[..., None]).exp().masked_fill(~self.seen, 0), lse

    def dropped(self, weights: Tensor, seed: Tensor, keep: int) -> Tensor:
        """weights * 65536 / keep where dropout keeps the pair, else 0."""
        B, H, L, _ = weights.shape
        index = torch.arange(L, device=weights.device)
        starts = self.documents.ne(torch.roll(self.documents, 1, dims=1)) | index.eq(0)
        place = index - torch.where(starts, index, 0).cummax(dim=1).values if L else self.documents  # (B, L)
        slot = place % SLOTS
        free = torch.arange(self.prefix, device=weights.device).expand(B, -1)
        key = torch.cat((free, self.prefix + place), dim=1)  # (B, P + L)
        head = torch.arange(B * H, device=weights.device).reshape(B, H, 1, 1)
        group, at = torch.unique(index - slot, return_inverse=True)  # (G,), (B, L)
        counter = (key[:, None, None], group[:, None], head, torch.ones_like(head))
        draws = slots(philox(counter, seed.to(weights.device))).permute(1, 3, 0, 2, 4)  # (B, G, 8, H, P + L)
        row = torch.arange(B, device=weights.device)[:, None]
        chosen = draws[row, at, slot].transpose(1, 2)  # (B, H, L, P + L)
        return torch.where(chosen < keep, weights * (65536 / keep), 0)
