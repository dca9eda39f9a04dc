"""BitNet b1.58 in plain torch: the product, its straight-through gradients, and weights of two bits.

A matrix W (N, K) has one scale, mean |W|, and codes clamp(round(W / scale), -1, 1); each token x (..., K) has one
scale, max |x| / 127, and integers clamp(round(x / scale), -128, 127). Halves round to even, divisions are products
with the reciprocal, ``eps`` is the least that mean |W| and max |x| count for. Then y = (integers . codes) scale scale +
bias. arXiv 2402.17764

Scales are in fp32, or in fp64 for fp64 inputs. The products of the training op run in bfloat16 for bfloat16 x, whose
fp32 sums are rounded before they are scaled, and in fp32 or fp64 otherwise: there the sums of integers are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16
_WEIGHTS_AT_ONCE = 1 << 18
_EXACT_IN_FP32 = 1 << 17  # so many integers of up to 127 sum up within the 24 bits of an fp32 number


def ternarize(weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return codes clamp(round(W / scale), -1, 1) and the scale max(mean |W|, eps), the latter in fp32 (or fp64).

    Args:
        weight: (N, K).
        eps: The least scale.
        dtype: Of the codes; None for that of the scale.
    """
    wide = _wide(weight)
    codes = weight.new_empty(weight.shape, dtype=dtype or wide)
    rows = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])  # by parts, for fresh memory is slower than the arithmetic
    total = torch.stack([part.to(wide).abs().sum() for part in weight.split(rows)]).sum()
    scale = (total / weight.numel()).clamp_(min=eps)
    for part, out in zip(weight.split(rows), codes.split(rows), strict=True):
        out.copy_((part.to(wide) * (1 / scale)).round_().clamp_(-1, 1))
    return codes, scale


def quantize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return integers clamp(round(127 x / peak), -128, 127) in fp32 (or fp64), and the scales (..., 1) peak / 127.

    Args:
        x: (..., K); peak is max |x| over the last dimension.
        eps: The least peak.
    """
    wide = x.to(_wide(x))
    peak = wide.abs().amax(dim=-1, keepdim=True).clamp_(min=eps)
    return (wide * (127 / peak)).round_().clamp_(-128, 127), peak / 127


def bitlinear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = (integers . codes) scale scale + bias.

    Returns:
        (..., N) y in the dtype of x, and what the backward needs of x: (..., K) int8 integers, (..., 1) scales.
    """
    with torch.autocast(x.device.type, enabled=False):
        integers, token_scale = quantize(x.contiguous(), eps)
        codes, scale = ternarize(weight, eps, _product_dtype(x))
        sums = torch.matmul(integers.to(codes.dtype), codes.mT)
        return _finish(sums, token_scale * scale, bias, x.dtype), integers.to(torch.int8), token_scale


def bitlinear_backward_reference(
    grad: Tensor, integers: Tensor, token_scale: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dx = grad (codes scale), dW = grad^T (integers scale): both quantisers count as the identity.

    Returns:
        (..., K) dx in the dtype of grad, (N, K) dW in the dtype of weight.
    """
    with torch.autocast(grad.device.type, enabled=False):
        codes, scale = ternarize(weight, eps, _product_dtype(grad))
        rows = grad.to(codes.dtype).reshape(-1, grad.shape[-1])
        dx = torch.matmul(rows, codes).mul_(scale).view(integers.shape)
        x = (integers * token_scale).to(codes.dtype).reshape(-1, integers.shape[-1])
        return dx.to(grad.dtype), torch.matmul(rows.mT, x).to(weight.dtype)


def bitlinear_ste(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """linear(x + (Q(x) - x).detach(), W + (Q(W) - W).detach(), bias): the definition, which autograd differentiates."""
    integers, token_scale = quantize(x.detach(), eps)
    codes, scale = ternarize(weight.detach(), eps)
    x_q = x + (integers * token_scale - x).detach()
    weight_q = weight + (codes * scale - weight).detach()
    return F.linear(x_q, weight_q, bias)


def pack(codes: Tensor) -> Tensor:
    """Pack (N, K) codes -1, 0, 1 into (ceil(N / 16), ceil(K / 16), 64) bytes; see ``pack_ternary`` for the layout."""
    n, k = codes.shape
    bits = F.pad(codes.to(torch.int16) + 1, (0, -k % TILE, 0, -n % TILE), value=1)
    # row = 16 i + r, column = 16 j + 4 s + b  ->  tile (i, j), byte 4 r + b, bits 2 s and 2 s + 1
    bits = bits.view(bits.shape[0] // TILE, TILE, bits.shape[1] // TILE, 4, 4).permute(0, 2, 1, 4, 3)  # i j r b s
    return (bits << torch.arange(0, 8, 2, device=codes.device)).sum(4).to(torch.uint8).flatten(2)


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return the (rows, columns) codes of ``pack``, in int8."""
    i, j, _ = packed.shape
    bits = packed.view(i, j, TILE, 4, 1) >> torch.arange(0, 8, 2, device=packed.device, dtype=torch.uint8)  # i j r b s
    codes = (bits & 3).to(torch.int8) - 1
    return codes.permute(0, 2, 1, 4, 3).reshape(i * TILE, j * TILE)[:rows, :columns]


def bitlinear_packed_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y = (integers . codes) scale scale + bias, with sums of integers that are exact.

    Returns:
        (..., N) y in the dtype of x.
    """
    with torch.autocast(x.device.type, enabled=False):
        integers, token_scale = quantize(x, eps)
        codes = unpack(packed, scale.shape[0], x.shape[-1])
        dtype = torch.float64 if x.shape[-1] > _EXACT_IN_FP32 else integers.dtype
        sums = torch.matmul(integers.to(dtype), codes.to(dtype).mT)
        return _finish(sums.to(integers.dtype), token_scale * scale, bias, x.dtype)


def _finish(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums.mul_(scale) if sums.dtype == scale.dtype else sums * scale
    if bias is not None:
        y.add_(bias)
    return y.to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.bfloat16 else _wide(x)
