"""HoPE, hyperbolic rotary positions (arXiv 2509.05218): relative, bidirectional, and bounded in every dtype.

A pair (e, o) of channels 2j, 2j+1 of query m and key n, at distance r = |m - n| within a document, scores

    (qe ke + qo ko) c_j(r) + (qe ko + qo ke) s_j(m - n),
    c_j = e^(-r th'_j) cosh(r th_j),   s_j = sign(m - n) e^(-r th'_j) sinh(r th_j),
    th_j = base^(-2j/K),   th'_j = th_j + damping,  so that |s_j| <= c_j <= 1.

In the eigenbasis u = (e + o)/sqrt 2, w = (e - o)/sqrt 2 the hyperbolic matrix is diagonal, and with the rates
a = damping and b_j = 2 th_j + damping a past key (n <= m) scores u u e^(-a r) + w w e^(-b_j r); for a future key the
two rates change places. An exponential decay splits at any border t between key and query into
e^(-b(m-t)) e^(-b(t-n)), both at most 1: so queries are taken in tiles, and the scores of a tile against all keys
before it, and against all keys after it, are plain matrix products of rescaled q and k. Inside a tile the border is its
middle; exponents are then at most the tile's length, whatever the length of the row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultrazoo.nn.dropout import drop

TILE = 32
"""Queries per tile: inside it factors stay under e^32 and products under e^64, far from the end of fp32 and bf16."""


def frequencies(
    key_width: int, base: float, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """th_j = base^(-2j/K) for the K/2 pairs of channels.

    Args:
        key_width: K, even.
        base: Larger is slower; at least 1, so that no frequency is above 1.
        dtype: Of the result; at least fp32.
        device: Where the result lives.

    Returns:
        (K/2,).

    Raises:
        ValueError: K is odd, or the base is under 1.
    """
    if key_width % 2:
        raise ValueError(f"HoPE: got key width {key_width}, expected an even one; it turns pairs of channels")
    if base < 1:
        raise ValueError(f"HoPE: got base {base}, expected at least 1; a frequency above 1 would overflow")
    return float(base) ** (-torch.arange(0, key_width, 2, dtype=dtype, device=device) / key_width)


def to_eigenbasis(x: Tensor) -> Tensor:
    """Turn pairs (e, o) into u = (e + o)/sqrt 2 and w = (e - o)/sqrt 2; all u come before all w.

    Args:
        x: (..., K), K even.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even + odd, even - odd), dim=-1) * math.sqrt(0.5)


def row_scores(q: Tensor, k: Tensor, start: int, stop: int, theta: Tensor, damping: float) -> Tensor:
    """Score the queries ``start:stop`` against every key.

    Args:
        q: (..., L, K) queries in the eigenbasis, in the dtype of the products.
        k: (..., L, K) keys in the eigenbasis, likewise.
        start: First query of the tile.
        stop: One past its last; at most ``TILE`` queries.
        theta: (K/2,) frequencies th_j, each at most 1.
        damping: Decay per token beyond the frequency, >= 0.

    Returns:
        (..., stop - start, L).
    """
    length, width = q.shape[-2], stop - start
    wide = torch.promote_types(q.dtype, torch.float32)
    rates = torch.cat((torch.zeros_like(theta), 2 * theta)).to(wide)  # (K) of a past key; a future key has them swapped
    swapped = rates.roll(theta.shape[0])
    index = torch.arange(length, device=q.device, dtype=wide)
    q_tile = q[..., start:stop, :]
    pieces = []

    def decay(distance: Tensor, rate: Tensor) -> Tensor:
        return torch.exp(-distance.unsqueeze(-1) * rate).to(q.dtype)

    if start > 0:
        q_past = q_tile * decay(index[:width], rates + damping)
        k_past = k[..., :start, :] * decay(start - index[:start], rates + damping)
        pieces.append(q_past @ k_past.transpose(-1, -2))

    offset = index[:width]
    middle = offset - width / 2
    k_tile = k[..., start:stop, :]
    past = (q_tile * decay(middle, rates)) @ (k_tile * decay(-middle, rates)).transpose(-1, -2)
    future = (q_tile * decay(-middle, swapped)) @ (k_tile * decay(middle, swapped)).transpose(-1, -2)
    distance = offset.unsqueeze(1) - offset
    pieces.append(torch.where(distance >= 0, past, future) * torch.exp(-damping * distance.abs()).to(q.dtype))

    if stop < length:
        q_future = q_tile * decay(width - offset, swapped + damping)
        k_future = k[..., stop:, :] * decay(index[: length - stop], swapped + damping)
        pieces.append(q_future @ k_future.transpose(-1, -2))
    return torch.cat(pieces, dim=-1)


def hope_scores(q: Tensor, k: Tensor, theta: Tensor, damping: float) -> Tensor:
    """sum_j (qe ke + qo ko) c_j(|m-n|) + (qe ko + qo ke) s_j(m-n), without the division by sqrt K.

    Args:
        q: (..., L, K) queries, in any float dtype; fp16 is computed in fp32.
        k: (..., L, K) keys.
        theta: (K/2,) frequencies th_j, each at most 1.
        damping: Decay per token beyond the frequency, >= 0.

    Returns:
        (..., L, L), in fp32 for fp16 inputs, otherwise in their dtype.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = (to_eigenbasis(x.float() if x.dtype == torch.float16 else x) for x in (q, k))
        length = q.shape[-2]
        rows = [row_scores(q, k, t, min(t + TILE, length), theta, damping) for t in range(0, length, TILE)]
        return torch.cat(rows, dim=-2)


def hope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    damping: float,
    *,
    mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """o = softmax(scores / sqrt K) v with HoPE scores, a tile of queries at a time.

    Args:
        q: (B, H, L, K) queries.
        k: (B, H, L, K) keys.
        v: (B, H, L, V) values.
        theta: (K/2,) frequencies.
        damping: Decay per token beyond the frequency, >= 0.
        mask: (B, 1, L, L) bool, True where the query sees the key; every query must see one.
        prefix: Keys (1, H, P, K) and values (1, H, P, V) that every query sees, at no position.
        dropout: Probability of dropping an attention probability.

    Returns:
        (B, H, L, V) in the dtype of v.
    """
    dtype, length = v.dtype, q.shape[-2]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = ((x.float() if x.dtype == torch.float16 else x) for x in (q, k, v))
        q = q * q.shape[-1] ** -0.5
        turned_q, turned_k = to_eigenbasis(q), to_eigenbasis(k)
        if prefix is not None:
            free_k, free_v = (x.to(v.dtype).expand(v.shape[0], -1, -1, -1) for x in prefix)
            v = torch.cat((free_v, v), dim=-2)
        rows = []
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            scores = row_scores(turned_q, turned_k, start, stop, theta, damping)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, :, start:stop], -torch.inf)
            if prefix is not None:
                scores = torch.cat((q[..., start:stop, :] @ free_k.transpose(-1, -2), scores), dim=-1)
            weights = torch.softmax(scores, dim=-1)
            rows.append(drop(weights, dropout, True) @ v)
        return torch.cat(rows, dim=-2).to(dtype)
