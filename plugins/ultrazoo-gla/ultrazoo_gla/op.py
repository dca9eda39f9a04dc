"""``gated_linear_attention``: linear attention whose state forgets by a gate for each key channel and token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrazoo.ops import OpLibrary
from ultrazoo.ops.arguments import FLOATING, Arguments
from ultrazoo.spec import OpSpec
from ultrazoo_gla.reference import (
    gated_linear_attention_backward_reference,
    gated_linear_attention_recurrent,
    gated_linear_attention_reference,
)
from ultrazoo_gla.samples import bench_samples, cost, samples

_NAME = "gla::gated_linear_attention"
library = OpLibrary("gla", sources=Path(__file__).parent / "csrc")


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, segments: Tensor | None = None, causal: bool = False
) -> Tensor:
    """o_n = q_n S_n + q_n diag(b_n) T_n+1, S_n = diag(a_n) S_n-1 + k_n v_n^T, T_n = diag(b_n) T_n+1 + k_n v_n^T.

    a and b are exp(log_gate), the gates of the states that run rightwards and leftwards; causal: o_n = q_n S_n. In
    other words o_n = sum_m (q_n . (w_nm k_m)) v_m with w_nm the gates a of the tokens after m up to n, the gates b of
    the tokens from n up to before m, or 1 for m = n. Nothing else is scaled. Work is linear in L; sums are in fp32.

    Args:
        q: (B, L, H, K) queries; q, k and v are taken in the widest of their dtypes.
        k: (B, L, H, K) keys.
        v: (B, L, H, V) values.
        log_gate: (B, L, H, K) natural logarithms of the gates, finite and <= 0; or (B, L, 2, H, K): a for the
            rightward state, then b for the leftward one, instead of one for both. Taken in at least fp32.
        segments: (B, L) int, 0 at padding, equal positive numbers for one document, each one run of tokens; None means
            that every row is one document. Padding counts nothing, also inside a document, and o is 0 there.
        causal: Read only m <= n.

    Returns:
        (B, L, H, V), contiguous, in the widest dtype of q, k and v.

    Raises:
        ValueError: A shape or a device does not fit, or a document returns (from a compiled kernel a RuntimeError).
        TypeError: A dtype does not fit.
    """
    result: Tensor = _attention(*_arguments(q, k, v, log_gate, segments, causal))
    return result


def _reference(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, segments: Tensor | None = None, causal: bool = False
) -> Tensor:
    """``gated_linear_attention`` by its reference, whatever the kernel policy."""
    result: Tensor = _attention.reference(*_arguments(q, k, v, log_gate, segments, causal))
    return result


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, segments: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The same function token by token."""
    arguments = _arguments(q, k, v, log_gate, segments, causal)
    return gated_linear_attention_recurrent(*arguments).to(arguments[0].dtype)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None, causal: bool
) -> tuple[Any, ...]:
    """Check what the caller gave, and bring it to what the schema takes."""
    where = "gated_linear_attention"
    if q.dim() != 4 or k.shape != q.shape:
        raise ValueError(f"{where}: q, k: got {_shape(q)} and {_shape(k)}, expected one shape (B, L, H, K) for both")
    B, L, H, K = q.shape
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"{where}: v: got {_shape(v)}, expected ({B}, {L}, {H}, V); q is {_shape(q)} = (B, L, H, K)")
    for_both = log_gate.shape == (B, L, 2, H, K) and not causal
    if log_gate.shape != q.shape and not for_both:
        other = "" if causal else f" or {(B, L, 2, H, K)}, a gate for each direction"
        raise ValueError(f"{where}: log_gate: got {_shape(log_gate)}, expected {_shape(q)}, the shape of q{other}")
    if segments is not None and segments.shape != q.shape[:2]:
        raise ValueError(f"{where}: segments: got {_shape(segments)}, expected {(B, L)}; one number per token")
    if segments is not None and (segments.is_floating_point() or segments.dtype == torch.bool):
        raise TypeError(f"{where}: segments: got {segments.dtype}, expected integers; 0 is padding")
    for name, x in (("q", q), ("k", k), ("v", v), ("log_gate", log_gate)):
        if x.dtype not in FLOATING:
            raise TypeError(f"{where}: {name}: got {x.dtype}, expected a floating-point dtype of 16, 32 or 64 bits")
    for name, other_input in (("k", k), ("v", v), ("log_gate", log_gate), ("segments", segments)):
        if other_input is not None and other_input.device != q.device:
            raise ValueError(f"{where}: {name}: got {other_input.device}, expected {q.device}, the device of q")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    gates = log_gate.to(torch.promote_types(dtype, torch.float32))
    if not for_both:
        gates = gates.unsqueeze(2).expand(B, L, 1 if causal else 2, H, K)
    segments = None if segments is None else segments.to(torch.int64)
    return q.to(dtype), k.to(dtype), v.to(dtype), gates, segments


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*ctx.backward_op(grad, *ctx.saved_tensors), None)


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None) -> Arguments:
    """Check the arguments of the op itself, as the kernel does."""
    args = Arguments(name, q)
    args.tensor("q", q, "B, L, H, K")
    args.tensor("k", k, "B, L, H, K", q.dtype)
    args.tensor("v", v, "B, L, H, V", q.dtype)
    args.tensor("log_gate", log_gate, "B, L, D, H, K", torch.promote_types(q.dtype, torch.float32))
    args.number("log_gate: D", log_gate.shape[2], 1, 2)
    args.tensor("segments", segments, "B, L", torch.int64)
    return args


def _check_backward(grad: Tensor, q: Tensor, *inputs: Any) -> None:
    args = _check(f"{_NAME}_backward", q, *inputs)
    args.tensor("grad", grad, "B, L, H, V", q.dtype)


_backward = library.define(
    "gated_linear_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor log_gate, Tensor? segments) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    gated_linear_attention_backward_reference,
    fake=lambda grad, q, k, v, log_gate, segments: tuple(x.new_empty(x.shape) for x in (q, k, v, log_gate)),
    check=_check_backward,
)
_attention = library.define(
    "gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor log_gate, Tensor? segments) -> Tensor",
    gated_linear_attention_reference,
    fake=lambda q, k, v, log_gate, segments: v.new_empty(v.shape),
    setup_context=_save,
    backward=_gradients,
    check=functools.partial(_check, _NAME),
)

SPEC = OpSpec(
    name="gla::gated_linear_attention",
    op=gated_linear_attention,
    reference=_reference,
    samples=samples,
    bench_samples=bench_samples,
    cost=cost,
    baselines={"recurrent": _recurrent},
)
