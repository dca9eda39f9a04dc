"""Rotary position embedding: pairs of channels are turned by angles that grow with the position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn pair j of ``x`` by ``position * base^(-2j/K)``: scores then depend on distances only. arXiv 2104.09864.

    Args:
        x: (B, L, H, K), queries or keys; K is even and channels (2j, 2j + 1) are a pair.
        positions: (B, L) or (1, L) int64, within the document (see ``ultrazoo.nn.segments.positions``).
        base: the slowest pair turns by about 1 / base radians a token.

    Returns:
        (B, L, H, K) in the dtype of ``x``; angles and products are taken in fp32, or fp64 for fp64 ``x``.

    Raises:
        ValueError: K is odd.
    """
    width = x.shape[-1]
    exponents = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width
    return rotate_pairs(x, positions, base**-exponents)


def rotate_pairs(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn pair j of ``x`` by ``position * frequencies[j]`` radians.

    Args:
        x: (B, L, H, K); channels (2j, 2j + 1) are a pair.
        positions: (B, L) or (1, L) int64.
        frequencies: (K / 2,), radians a token.

    Returns:
        (B, L, H, K) in the dtype of ``x``; angles and products are taken in fp32, or fp64 for fp64 ``x``.

    Raises:
        ValueError: ``frequencies`` does not hold one number for each pair of channels.
    """
    width = x.shape[-1]
    if width != 2 * frequencies.shape[0]:
        raise ValueError(
            f"rotary: got head width {width} and {frequencies.shape[0]} frequencies, expected an even width and one "
            "frequency for each pair; choose a hidden size and heads that give an even width"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    angles = positions.unsqueeze(-1).to(dtype) * frequencies.to(dtype)
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)  # (B, L, 1, K / 2), a pair is a complex number
    pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
