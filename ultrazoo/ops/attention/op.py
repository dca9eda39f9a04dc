"""``attention``: softmax or sigmoid attention within documents, with dropout."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ultrazoo.ops import library, loader
from ultrazoo.ops.attention.plain import plain_sigmoid, plain_softmax
from ultrazoo.ops.attention.reference import attention_backward_reference, attention_reference
from ultrazoo.ops.attention.samples import bench_samples, cost, samples
from ultrazoo.ops.philox import draw_seed, kept_of_65536
from ultrazoo.ops.segments import checked
from ultrazoo.spec import OpSpec

Kind = Literal["softmax", "sigmoid"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    kind: Kind = "softmax",
    scale: float | None = None,
    prefix: int = 0,
) -> Tensor:
    """o_n = sum_m w_nm v_m over the keys of n's document: w = softmax(scale q k^T), or sigmoid(scale q k^T - log M).

    M is the number of keys that the query sees. Pairs of different documents are never computed, and the scores never
    stand in memory as a whole; the backward computes them again from the logarithm of the softmax's sums. Sums are in
    fp32. On a device without a kernel, unless the policy asks for the reference, a call without dropout or without a
    seed goes to torch: the softmax to scaled_dot_product_attention, which on a GPU is FlashAttention, the sigmoid to
    plain operators; the dropout is then torch's too.

    Args:
        q: (B, L, H, K) queries; q, k and v are taken in the widest of their dtypes, and read as they lie.
        k: (B, P + L, H, K) keys.
        v: (B, P + L, H, V) values.
        segments: (B, L) int, 0 at padding, equal positive numbers for one document, each one run of tokens; None means
            that every row is one document. Padding is not read, also inside a document, and o is 0 there.
        dropout: Probability of dropping a weight, in [0, 1); kept ones are divided by the probability of keeping,
            which is rounded to a multiple of 1 / 65536. The backward draws the mask again.
        seed: 0-dim int64, of which the mask is a function; None draws one from torch's global generator of the CPU,
            and none without dropout.
        kind: softmax or sigmoid.
        scale: Of the scores; None for K^-0.5.
        prefix: P, keys that stand before those of the row and that every query sees.

    Returns:
        (B, L, H, V), contiguous, in the widest dtype of q, k and v.

    Raises:
        ValueError: A shape, a device or an option does not fit, or a document returns (from a compiled kernel a
            RuntimeError).
        TypeError: A dtype does not fit.
    """
    q, k, v, segments = _checked(q, k, v, segments, dropout, seed, kind, prefix)
    scale = _scale(q) if scale is None else scale
    if (seed is None or dropout == 0) and _runs_plain(q.device.type, kind):
        plain = plain_softmax if kind == "softmax" else plain_sigmoid
        return plain(q, k, v, None if segments is None else checked(segments), dropout, scale, prefix)
    return _run(_attention, q, k, v, segments, dropout, seed, kind, scale, prefix)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    kind: Kind = "softmax",
    scale: float | None = None,
    prefix: int = 0,
) -> Tensor:
    """``attention`` by its reference, whatever the kernel policy."""
    q, k, v, segments = _checked(q, k, v, segments, dropout, seed, kind, prefix)
    scale = _scale(q) if scale is None else scale
    return _run(_attention.reference, q, k, v, segments, dropout, seed, kind, scale, prefix)


def _scale(q: Tensor) -> float:
    return float(max(1, q.shape[3]) ** -0.5)


def _run(
    op: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    kind: Kind,
    scale: float,
    prefix: int,
) -> Tensor:
    if dropout == 0:
        seed = torch.zeros((), dtype=torch.int64)
    elif seed is None:
        seed = draw_seed()
    o, _ = op(q, k, v, segments, seed, kept_of_65536(dropout), scale, prefix, kind == "sigmoid")
    result: Tensor = o
    return result


@torch.compiler.assume_constant_result
def _runs_plain(device: str, kind: Kind) -> bool:
    """Whether calls on a device go to torch's operators: there is no kernel, and the policy lets them."""
    policy = library.get_kernel_policy()
    fused = kind == "softmax" and device != "cpu"  # torch's own kernels there are compiled ones
    if device == "meta" or policy == "reference" or (policy == "compiled" and not fused):
        return False
    loader.load()
    return not _attention.has_kernel(device)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    kind: str,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check what the caller gave, and bring it to one dtype."""
    if q.dim() != 4 or prefix < 0:
        raise ValueError(f"attention: q, prefix: got {_shape(q)} and {prefix}, expected (B, L, H, K) and at least 0")
    B, L, H, K = q.shape
    if _shape(k) != (B, prefix + L, H, K):
        raise ValueError(
            f"attention: k: got {_shape(k)}, expected {(B, prefix + L, H, K)}; q is {_shape(q)} = (B, L, H, K) and "
            f"prefix {prefix}"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: v: got {_shape(v)}, expected ({B}, {prefix + L}, {H}, V); k is {_shape(k)}")
    if segments is not None and segments.shape != q.shape[:2]:
        raise ValueError(f"attention: segments: got {_shape(segments)}, expected ({B}, {L}); one number per query")
    if segments is not None and (segments.is_floating_point() or segments.dtype == torch.bool):
        raise TypeError(f"attention: segments: got {segments.dtype}, expected integers; 0 is padding")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout: got {dropout}, expected a probability in [0, 1)")
    if seed is not None and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise ValueError(
            f"attention: seed: got {_shape(seed)} {seed.dtype}, expected a 0-dim int64 tensor; torch.tensor(1)"
        )
    if kind not in get_args(Kind):
        raise ValueError(f"attention: kind: got {kind!r}, expected one of {', '.join(get_args(Kind))}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise TypeError(f"attention: {name}: got {x.dtype}, expected a floating-point dtype")
    for name, other in (("k", k), ("v", v), ("segments", segments)):
        if other is not None and other.device != q.device:
            raise ValueError(f"attention: {name}: got {other.device}, expected {q.device}, the device of q")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), None if segments is None else segments.to(torch.int64)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, seed, *ctx.options = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, segments, seed)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = ctx.backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("attention has no second derivative; call backward without create_graph")


def _fake(
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
    B, L, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B, L, H, v.shape[3]), q.new_empty(0 if sigmoid else B, H, L, dtype=wide)


_OPTIONS = "Tensor? segments, Tensor seed, int keep, float scale, int prefix, bool sigmoid"
_attention_backward = library.define(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    attention_backward_reference,
    fake=lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    backward=_no_second_derivative,
)
_attention = library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    attention_reference,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    kind: Kind = "softmax",
    scale: float | None = None,
    prefix: int = 0,
) -> Tensor:
    """torch's softmax attention at the same shapes, with its own dropout and the documents as a mask."""
    return plain_softmax(q, k, v, segments, dropout, _scale(q) if scale is None else scale, prefix)


SPEC = OpSpec(
    name="ultrazoo::attention",
    op=attention,
    reference=_reference,
    samples=samples,
    bench_samples=bench_samples,
    cost=cost,
    baselines={"sdpa": _sdpa},
)
SPECS = (SPEC,)
