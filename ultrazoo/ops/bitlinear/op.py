"""``bitlinear`` trains BitNet b1.58; ``pack_ternary`` and ``bitlinear_packed`` run it with two bits a weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops import library
from ultrazoo.ops.arguments import Arguments, wide
from ultrazoo.ops.bitlinear.reference import (
    TILE,
    bitlinear_backward_reference,
    bitlinear_packed_reference,
    bitlinear_reference,
    pack,
    ternarize,
)
from ultrazoo.ops.bitlinear.samples import (
    bench_samples,
    cost,
    packed_bench_samples,
    packed_cost,
    packed_samples,
    samples,
)
from ultrazoo.spec import OpSpec

LEAST_EPS, MOST_EPS = 1e-36, 1e18
"""127 / eps and eps^2 are finite in fp32."""
MOST_COLUMNS = 0x7FFFFFFF // 256
"""The kernels' sums of integers fit int32."""


def bitlinear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """y = Q8(x) Qt(W)^T + bias: activations in int8 per token, ternary weights per matrix (BitNet b1.58).

    Qt(W) = clamp(round(W / s), -1, 1) s with s = mean |W|; Q8(x) = clamp(round(x / t), -128, 127) t with
    t = max |x| / 127 over the last dimension; halves round to even. Gradients pass straight through both, also where
    they clamp. The backward keeps x as its int8 integers.

    The weight is quantised anew in every forward and backward and never cached: optimisers may write to it unseen by
    autograd's version counter, and the cost is 3 % of a training step at 512 tokens, 1 % at 2048. To run a fixed
    weight many times, ``pack_ternary`` it once.

    Args:
        x: (..., K); its dtype is that of the products and of y.
        weight: (N, K) master weight, of any floating-point dtype; it is quantised as it is, never rounded to that of x.
        bias: (N,) or None.
        eps: The least that mean |W| and max |x| count for, from 1e-36 to 1e18.

    Returns:
        (..., N), contiguous, in the dtype of x.

    Raises:
        ValueError: A shape, a device or eps does not fit.
        TypeError: A dtype is not a floating-point one of 16, 32 or 64 bits.
        KernelUnavailableError: The policy is ``compiled``, and x, the weight or the bias is in fp64.
    """
    y: Tensor = _bitlinear(x, weight, bias, eps)[0]
    return y


def pack_ternary(weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Quantise a weight once, into two bits a number.

    The layout is one of tiles, 16 rows by 16 columns in 64 bytes. With r < 16, s < 4 and b < 4, row 16 i + r and
    column 16 j + 4 s + b are in tile (i, j), byte 4 r + b, bits 2 s and 2 s + 1, as code + 1: 0, 1 or 2. Missing rows
    and columns of the last tiles hold code 0.

    So the 64 bytes, shifted right by 2 s and masked with 3, hold in their 32-bit lane r four consecutive columns of
    row r: what one dot-product instruction (AVX-512 VNNI; AVX2's maddubs and madd; NEON's sdot) multiplies with four
    broadcast activations, into one accumulator per row and with no sum across lanes. Since codes + 1 are unsigned, the
    sum of the activations is taken off at the end.

    Args:
        weight: (N, K).
        eps: The least that mean |W| counts for.

    Returns:
        (ceil(N / 16), ceil(K / 16), 64) uint8 packed codes: two bits a weight where N and K are multiples of 16, and
        whole tiles otherwise, so (3, 68) takes 320 bytes where 51 would do. And (N,) fp32 scale of each row: all equal
        here, while matrices whose N is a multiple of 16 may be concatenated with their own.

    Raises:
        ValueError: The weight is not a matrix, or is empty.
        TypeError: Its dtype is not floating-point.
    """
    args = Arguments("pack_ternary", weight)
    _check_weight(args, weight)
    _check_eps(args, eps)
    codes, scale = ternarize(weight.detach(), eps, torch.int8)
    return pack(codes), scale.to(torch.float32).expand(weight.shape[0]).contiguous()


def bitlinear_packed(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """y = Q8(x) (codes scale)^T + bias for inference: integers times codes, summed exactly in int32.

    Equal to ``bitlinear`` of the weight that was packed, but for the dtype of the products; no gradient.

    Args:
        x: (..., K).
        packed: (ceil(N / 16), ceil(K / 16), 64) uint8 of ``pack_ternary``.
        scale: (N,) fp32 of ``pack_ternary``.
        bias: (N,) or None.
        eps: The least that max |x| counts for.

    Returns:
        (..., N), contiguous, in the dtype of x.

    Raises:
        ValueError: A shape or a device does not fit, or x requires a gradient.
        TypeError: A dtype does not fit.
    """
    _refuse_gradient(x)
    y: Tensor = _bitlinear_packed(x, packed, scale, bias, eps)
    return y


def _bitlinear_twin(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``bitlinear`` by its reference, whatever the kernel policy."""
    y: Tensor = _bitlinear.reference(x, weight, bias, eps)[0]
    return y


def _packed_twin(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``bitlinear_packed`` by its reference, whatever the kernel policy."""
    _refuse_gradient(x)
    y: Tensor = _bitlinear_packed.reference(x, packed, scale, bias, eps)
    return y


def _refuse_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "ultrazoo::bitlinear_packed: x: got a tensor that requires a gradient, which this op lacks; "
            "train with bitlinear"
        )


def _check_weight(args: Arguments, weight: Tensor) -> None:
    args.tensor("weight", weight, "N, K")
    args.number("N", weight.shape[0], 1, math.inf)
    args.number("K", weight.shape[1], 1, MOST_COLUMNS)


def _check_eps(args: Arguments, eps: float) -> None:
    args.number("eps", eps, LEAST_EPS, MOST_EPS)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    args = Arguments("ultrazoo::bitlinear", x)
    _check_weight(args, weight)
    args.tensor("x", x, "..., K")
    args.tensor("bias", bias, "N")
    _check_eps(args, eps)


def _check_backward(grad: Tensor, integers: Tensor, token_scale: Tensor, weight: Tensor, eps: float) -> None:
    args = Arguments("ultrazoo::bitlinear_backward", grad)
    _check_weight(args, weight)
    args.tensor("grad", grad, "..., N")
    args.tensor("integers", integers, "..., K", torch.int8)
    args.tensor("token_scale", token_scale, "..., 1", wide(grad.dtype))
    _check_eps(args, eps)


def _check_packed(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, eps: float) -> None:
    args = Arguments("ultrazoo::bitlinear_packed", x)
    args.tensor("x", x, "..., K")
    args.tensor("scale", scale, "N", torch.float32)
    args.tensor("bias", bias, "N")
    args.number("K", args.sizes["K"], 1, MOST_COLUMNS)
    for symbol in "NK":
        args.sizes[f"ceil({symbol} / {TILE})"] = -(-args.sizes[symbol] // TILE)
    args.tensor("packed", packed, "ceil(N / 16), ceil(K / 16), 64", torch.uint8)
    _check_eps(args, eps)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[:-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((*lead, weight.shape[0])),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*lead, 1), dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, bias, ctx.eps = inputs
    _, integers, token_scale = output
    ctx.mark_non_differentiable(integers, token_scale)
    ctx.save_for_backward(integers, token_scale, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.backward_op(grad, *ctx.saved_tensors, ctx.eps)
    db: Tensor | None = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        db = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    return dx, dw, db, None


_bitlinear_backward = library.define(
    "bitlinear_backward(Tensor grad, Tensor integers, Tensor token_scale, Tensor weight, float eps) "
    "-> (Tensor, Tensor)",
    bitlinear_backward_reference,
    fake=lambda grad, integers, token_scale, weight, eps: (
        grad.new_empty(integers.shape),
        weight.new_empty(weight.shape),
    ),
    typed=("weight",),
    check=_check_backward,
)
_bitlinear = library.define(
    "bitlinear(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    bitlinear_reference,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
    typed=("weight", "bias"),
    check=_check,
)
_bitlinear_packed = library.define(
    "bitlinear_packed(Tensor x, Tensor packed, Tensor scale, Tensor? bias, float eps) -> Tensor",
    bitlinear_packed_reference,
    fake=lambda x, packed, scale, bias, eps: x.new_empty((*x.shape[:-1], scale.shape[0])),
    typed=("bias",),
    check=_check_packed,
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """The same product without quantisation, in the dtype of x: another function, the yardstick for speed."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


SPECS = (
    OpSpec(
        name="ultrazoo::bitlinear",
        op=bitlinear,
        reference=_bitlinear_twin,
        samples=samples,
        bench_samples=bench_samples,
        cost=cost,
        straight_through=True,
        baselines={"linear": _linear},
    ),
    OpSpec(
        name="ultrazoo::bitlinear_packed",
        op=bitlinear_packed,
        reference=_packed_twin,
        samples=packed_samples,
        bench_samples=packed_bench_samples,
        cost=packed_cost,
        differentiable=False,
        constants=("scale",),
    ),
)
