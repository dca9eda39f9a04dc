"""``retention``: exponentially decaying linear attention, causal or in both directions."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops import library
from ultrazoo.ops.arguments import Arguments, document_numbers, wide, widest
from ultrazoo.ops.retention.reference import (
    retention_backward_reference,
    retention_parallel,
    retention_reference,
)
from ultrazoo.ops.retention.samples import bench_samples, cost, samples
from ultrazoo.spec import OpSpec

_NAME = "ultrazoo::retention"


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    segments: Tensor | None = None,
    causal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """o_n = sum_m exp(log_decay |n - m|) (q_n . k_m) v_m, over m <= n when causal, within a document.

    No other scaling is applied. Work is linear in L and memory O(L), forward and backward; sums are in fp32.

    Args:
        q: (B, L, H, K) queries; q, k and v are taken in the widest of their dtypes.
        k: (B, L, H, K) keys.
        v: (B, L, H, V) values.
        log_decay: (H,) natural logarithm of each head's decay, finite and <= 0; a constant, it has no gradient.
        segments: (B, L) int, 0 at padding, equal positive numbers for one document, each one run of tokens; None means
            that every row is one document. Padding counts nothing, also inside a document, and o is 0 there.
        causal: Read only m <= n; otherwise both sides, and the diagonal once.
        chunk_size: C, tokens whose scores are computed as one matrix; None leaves the choice to the kernel. The
            result depends on it by rounding alone.

    Returns:
        (B, L, H, V), contiguous, in the widest dtype of q, k and v.

    Raises:
        ValueError: A shape, a device or ``chunk_size`` does not fit, ``log_decay`` requires a gradient, or a document
            returns (from a compiled kernel a RuntimeError).
        TypeError: A dtype does not fit.
    """
    result: Tensor = _retention(*_arguments(q, k, v, log_decay, segments, causal, chunk_size))
    return result


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    segments: Tensor | None = None,
    causal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """``retention`` by its reference, whatever the kernel policy."""
    result: Tensor = _retention.reference(*_arguments(q, k, v, log_decay, segments, causal, chunk_size))
    return result


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segments: Tensor | None,
    causal: bool,
    chunk_size: int | None,
) -> tuple[Any, ...]:
    """Bring what the caller gave to what the schema takes."""
    dtype = widest(_NAME, q=q, k=k, v=v)
    widest(_NAME, log_decay=log_decay)
    if log_decay.requires_grad:
        raise ValueError(f"{_NAME}: log_decay: got a tensor that requires a gradient, expected a constant; detach it")
    log_decay, segments = log_decay.to(wide(dtype)), document_numbers(_NAME, segments)
    return q.to(dtype), k.to(dtype), v.to(dtype), log_decay, segments, causal, chunk_size


def _check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segments: Tensor | None,
    causal: bool,
    chunk_size: int | None,
) -> Arguments:
    args = Arguments(name, q)
    args.tensor("q", q, "B, L, H, K")
    args.tensor("k", k, "B, L, H, K", q.dtype)
    args.tensor("v", v, "B, L, H, V", q.dtype)
    args.tensor("log_decay", log_decay, "H", wide(q.dtype))
    args.tensor("segments", segments, "B, L", torch.int64)
    if chunk_size is not None:
        args.number("chunk_size", chunk_size, 1, math.inf)
    return args


def _check_backward(grad: Tensor, q: Tensor, *inputs: Any) -> None:
    args = _check(f"{_NAME}_backward", q, *inputs)
    args.tensor("grad", grad, "B, L, H, V", q.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, log_decay, segments, ctx.causal, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, log_decay, segments)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = ctx.backward_op(grad, *ctx.saved_tensors, ctx.causal, ctx.chunk_size)
    return dq, dk, dv, None, None, None, None


_retention_backward = library.define(
    "retention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? segments, bool causal, "
    "int? chunk_size) -> (Tensor, Tensor, Tensor)",
    retention_backward_reference,
    fake=lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    check=_check_backward,
)
_retention = library.define(
    "retention(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? segments, bool causal, int? chunk_size) "
    "-> Tensor",
    retention_reference,
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
    setup_context=_save,
    backward=_gradients,
    check=functools.partial(_check, _NAME),
)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    segments: Tensor | None = None,
    causal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Softmax attention at the same shapes: another function, the yardstick for speed.

    q and k are padded to the width of v, or torch would take its slow path.
    """
    scale, missing = q.shape[3] ** -0.5, max(0, v.shape[3] - q.shape[3])
    q, k = (F.pad(x, (0, missing)).transpose(1, 2) for x in (q, k))  # (B, H, L, max(K, V))
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def _parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    segments: Tensor | None = None,
    causal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """The same function with the whole matrix of scores."""
    return retention_parallel(q, k, v, log_decay, segments, causal)


SPEC = OpSpec(
    name="ultrazoo::retention",
    op=retention,
    reference=_reference,
    samples=samples,
    bench_samples=bench_samples,
    cost=cost,
    constants=("log_decay",),
    baselines={"sdpa": _sdpa, "parallel": _parallel},
)
SPECS = (SPEC,)
