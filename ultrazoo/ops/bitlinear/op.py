"""``bitlinear`` trains BitNet b1.58; ``pack_ternary`` and ``bitlinear_packed`` run it with two bits a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops import library
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
        eps: The least that mean |W| and max |x| count for.

    Returns:
        (..., N), contiguous, in the dtype of x.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype is not floating-point.
    """
    _check(x, weight, bias)
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
    _check_weight("pack_ternary", weight)
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
    _check_packed(x, packed, scale, bias)
    y: Tensor = _bitlinear_packed(x, packed, scale, bias, eps)
    return y


def _bitlinear_twin(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``bitlinear`` by its reference, whatever the kernel policy."""
    _check(x, weight, bias)
    y: Tensor = _bitlinear.reference(x, weight, bias, eps)[0]
    return y


def _packed_twin(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``bitlinear_packed`` by its reference, whatever the kernel policy."""
    _check_packed(x, packed, scale, bias)
    y: Tensor = _bitlinear_packed.reference(x, packed, scale, bias, eps)
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_weight("bitlinear", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"bitlinear: x: got {tuple(x.shape)}, expected (..., {weight.shape[1]}); weight is {tuple(weight.shape)}"
        )
    _check_rest("bitlinear", x, weight.shape[0], bias, weight=weight)


def _check_weight(op: str, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{op}: weight: got {tuple(weight.shape)}, expected (N, K), neither of them 0")
    if not weight.is_floating_point():
        raise TypeError(f"{op}: weight: got {weight.dtype}, expected a floating-point dtype")


def _check_packed(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    op = "bitlinear_packed"
    if scale.dim() != 1 or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x, scale: got {tuple(x.shape)} and {tuple(scale.shape)}, expected (..., K) and (N,)")
    expected = (-(-scale.shape[0] // TILE), -(-x.shape[-1] // TILE), TILE * TILE // 4)
    if packed.shape != expected:
        raise ValueError(
            f"{op}: packed: got {tuple(packed.shape)}, expected {expected}; x is {tuple(x.shape)} = (..., K) and scale "
            f"{tuple(scale.shape)} = (N,)"
        )
    if packed.dtype != torch.uint8 or scale.dtype != torch.float32:
        raise TypeError(f"{op}: packed, scale: got {packed.dtype} and {scale.dtype}, expected uint8 and float32")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: x: got a tensor that requires a gradient, which this op lacks; train with bitlinear")
    _check_rest(op, x, scale.shape[0], bias, packed=packed, scale=scale)


def _check_rest(op: str, x: Tensor, n: int, bias: Tensor | None, **others: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x: got {x.dtype}, expected a floating-point dtype")
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"{op}: bias: got {tuple(bias.shape)}, expected ({n},)")
        others["bias"] = bias
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{op}: {name}: got {other.device}, expected {x.device}, the device of x")


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


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("bitlinear has no second derivative; call backward without create_graph")


_bitlinear_backward = library.define(
    "bitlinear_backward(Tensor grad, Tensor integers, Tensor token_scale, Tensor weight, float eps) "
    "-> (Tensor, Tensor)",
    bitlinear_backward_reference,
    fake=lambda grad, integers, token_scale, weight, eps: (
        grad.new_empty(integers.shape),
        weight.new_empty(weight.shape),
    ),
    backward=_no_second_derivative,
)
_bitlinear = library.define(
    "bitlinear(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    bitlinear_reference,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
)
_bitlinear_packed = library.define(
    "bitlinear_packed(Tensor x, Tensor packed, Tensor scale, Tensor? bias, float eps) -> Tensor",
    bitlinear_packed_reference,
    fake=lambda x, packed, scale, bias, eps: x.new_empty((*x.shape[:-1], scale.shape[0])),
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
