"""``selective_scan``: Mamba's recurrence, whose step size, input and output depend on the token."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ultrazoo.ops import library
from ultrazoo.ops.arguments import Arguments, document_numbers, wide, widest
from ultrazoo.ops.selective_scan.reference import (
    CHUNK,
    selective_scan_backward_reference,
    selective_scan_loop,
    selective_scan_reference,
)
from ultrazoo.ops.selective_scan.samples import bench_samples, cost, samples
from ultrazoo.spec import OpSpec

_NAME = "ultrazoo::selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    segments: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """y_t = (C_t . x_t + D u_t) silu(z_t) with x_t = exp(delta_t A) x_t-1 + delta_t u_t B_t (Mamba, arXiv 2312.00752).

    The state is in fp32 and x = 0 before each document. Memory is O(length), forward and backward: only every 32nd
    state is kept, and the backward computes the others anew.

    Args:
        u: (batch, length, dim) input; u, delta, B, C and z are taken in the widest of their dtypes.
        delta: (batch, length, dim) step size, before ``delta_bias`` and softplus.
        A: (dim, state) decay rate, real and negative.
        B: (batch, length, state) weight of the input.
        C: (batch, length, state) weight of the state in the output.
        D: (dim,) weight of the input in the output, or None.
        z: (batch, length, dim) gate, or None.
        delta_bias: (dim,) added to delta, or None.
        delta_softplus: Take softplus(delta + delta_bias) for the step size.
        segments: (batch, length) int, 0 at padding, equal positive numbers for one document, each one run of tokens;
            None means that every row is one document. Padding counts nothing, also inside a document, and y is 0 there.
        reverse: Scan from right to left; each document then starts at its end.

    Returns:
        (batch, length, dim), contiguous, in the widest dtype of u, delta, B, C and z.

    Raises:
        ValueError: A shape or a device does not fit, or a document returns (from a compiled kernel a RuntimeError).
        TypeError: A dtype does not fit.
    """
    y: Tensor = _scan(*_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, reverse))[0]
    return y


def _twin(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    segments: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """``selective_scan`` by its reference, whatever the kernel policy."""
    y: Tensor = _scan.reference(*_arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, reverse))[0]
    return y


def _arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Any, ...]:
    """Bring what the caller gave to what the schema takes."""
    dtype = widest(_NAME, u=u, delta=delta, B=B, C=C, z=z)
    widest(_NAME, A=A, D=D, delta_bias=delta_bias)
    u, delta, B, C = (x.to(dtype) for x in (u, delta, B, C))
    D, delta_bias = (None if x is None else x.to(wide(dtype)) for x in (D, delta_bias))
    z = None if z is None else z.to(dtype)
    segments = document_numbers(_NAME, segments)
    return u, delta, A.to(wide(dtype)), B, C, D, z, delta_bias, delta_softplus, segments, reverse


def _check(
    name: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: Tensor | None,
    reverse: bool,
) -> Arguments:
    args = Arguments(name, u)
    args.tensor("u", u, "batch, length, dim")
    args.tensor("delta", delta, "batch, length, dim", u.dtype)
    args.tensor("A", A, "dim, state", wide(u.dtype))
    args.tensor("B", B, "batch, length, state", u.dtype)
    args.tensor("C", C, "batch, length, state", u.dtype)
    args.tensor("D", D, "dim", wide(u.dtype))
    args.tensor("z", z, "batch, length, dim", u.dtype)
    args.tensor("delta_bias", delta_bias, "dim", wide(u.dtype))
    args.tensor("segments", segments, "batch, length", torch.int64)
    return args


def _check_backward(grad: Tensor, states: Tensor, u: Tensor, *inputs: Any) -> None:
    args = _check(f"{_NAME}_backward", u, *inputs)
    args.tensor("grad", grad, "batch, length, dim", u.dtype)
    args.sizes["ceil(length / 32)"] = -(-u.shape[1] // CHUNK)
    args.tensor("states", states, "batch, ceil(length / 32), state, dim", wide(u.dtype))


def _fake(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    chunks = -(-u.shape[1] // CHUNK)
    wide = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape), u.new_empty((u.shape[0], chunks, A.shape[1], A.shape[0]), dtype=wide)


def _fake_backward(grad: Tensor, states: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    u, D, z, delta_bias = inputs[0], *inputs[5:8]
    absent = [u.new_empty(0, dtype=states.dtype), u.new_empty(0), u.new_empty(0, dtype=states.dtype)]
    optional = [y if x is None else x.new_empty(x.shape) for x, y in zip((D, z, delta_bias), absent, strict=True)]
    return tuple([*(x.new_empty(x.shape) for x in inputs[:5]), *optional])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, segments, ctx.reverse = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors, segments)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, segments = ctx.saved_tensors
    gradients = ctx.backward_op(grad, *tensors, ctx.delta_softplus, segments, ctx.reverse)
    present = [None if x is None else g for g, x in zip(gradients, tensors[1:], strict=True)]
    return *present, None, None, None


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? segments, bool reverse"
)
_scan_backward = library.define(
    f"selective_scan_backward(Tensor grad, Tensor states, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
    selective_scan_backward_reference,
    fake=_fake_backward,
    check=_check_backward,
)
_scan = library.define(
    f"selective_scan({_ARGUMENTS}) -> (Tensor, Tensor)",
    selective_scan_reference,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
    check=functools.partial(_check, _NAME),
)

SPEC = OpSpec(
    name="ultrazoo::selective_scan",
    op=selective_scan,
    reference=_twin,
    samples=samples,
    bench_samples=bench_samples,
    cost=cost,
    baselines={"loop": selective_scan_loop},
)
SPECS = (SPEC,)
