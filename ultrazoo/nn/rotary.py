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
    return turn_pairs(x, angles.cos(), angles.sin())


@torch.library.custom_op("ultrazoo::turn_pairs", mutates_args=())
def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply pair j of ``x``, read as a complex number, by ``cos_j + i sin_j``.

    Args:
        x: (B, L, H, K), channels (2j, 2j + 1) a pair.
        cos: (B or 1, L, K / 2) fp32, or fp64.
        sin: Likewise.

    Returns:
        (B, L, H, K) in the dtype of ``x``; products are taken in that of ``cos``.
    """
    pairs = torch.view_as_complex(x.to(cos.dtype).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(2)).flatten(-2).to(x.dtype)


@turn_pairs.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
    return turn_pairs(grad, cos, -sin), None, None


turn_pairs.register_autograd(_backward, setup_context=_save)
