"""``attention``: softmax or sigmoid attention within documents, with dropout."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ultrazoo.ops import library, loader
from ultrazoo.ops.arguments import MOST, Arguments, document_numbers, wide, widest
from ultrazoo.ops.attention.plain import plain_sigmoid, plain_softmax
from ultrazoo.ops.attention.reference import attention_backward_reference, attention_reference
from ultrazoo.ops.attention.samples import bench_samples, cost, samples
from ultrazoo.ops.philox import draw_seed, kept_of_65536
from ultrazoo.ops.segments import checked
from ultrazoo.spec import OpSpec

Kind = Literal["softmax", "sigmoid"]
_NAME = "ultrazoo::attention"


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
    q, k, v, segments, scale = _arguments(q, k, v, segments, dropout, kind, scale)
    if (seed is None or dropout == 0) and _runs_plain(q.device.type, kind):
        unused = torch.zeros((), dtype=torch.int64) if seed is None else seed
        _check(_NAME, q, k, v, segments, unused, kept_of_65536(dropout), scale, prefix, kind == "sigmoid")
        plain = plain_softmax if kind == "softmax" else plain_sigmoid
        documents = None if segments is None else checked(segments)
        with torch.autocast(q.device.type, enabled=False):  # unlike without_autocast, torch.compile traces it
            return plain(q, k, v, documents, dropout, scale, prefix)
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
    q, k, v, segments, scale = _arguments(q, k, v, segments, dropout, kind, scale)
    return _run(_attention.reference, q, k, v, segments, dropout, seed, kind, scale, prefix)


def _scale(q: Tensor) -> float:
    return float(max(1, q.shape[-1] if q.dim() else 1) ** -0.5)


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
    if seed is None:
        seed = draw_seed() if dropout > 0 else torch.zeros((), dtype=torch.int64)
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


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    dropout: float,
    kind: str,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Check the options, and bring the tensors to what the schema takes."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{_NAME}: dropout: got {dropout}, expected a probability in [0, 1)")
    if kind not in get_args(Kind):
        raise ValueError(f"{_NAME}: kind: got {kind!r}, expected one of {', '.join(get_args(Kind))}")
    dtype = widest(_NAME, q=q, k=k, v=v)
    q, k, v, segments = q.to(dtype), k.to(dtype), v.to(dtype), document_numbers(_NAME, segments)
    scale = _scale(q) if scale is None else scale
    return q, k, v, segments, scale


def _check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    seed: Tensor,
    keep: int,
    scale: float,
    prefix: int,
    sigmoid: bool,
) -> Arguments:
    args = Arguments(name, q)
    args.tensor("q", q, "B, L, H, K")
    args.number("prefix", prefix, 0, 1 << 40)
    args.sizes["P + L"] = prefix + q.shape[1]
    args.tensor("k", k, "B, P + L, H, K", q.dtype)
    args.tensor("v", v, "B, P + L, H, V", q.dtype)
    args.tensor("segments", segments, "B, L", torch.int64)
    args.tensor("seed", seed, "", torch.int64, devices=(torch.device("cpu"),))
    args.number("keep", keep, 1, 65536)
    args.number("scale", scale, -MOST, MOST)
    return args


def _check_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any) -> None:
    args = _check(f"{_NAME}_backward", q, k, v, *options)
    args.tensor("grad", grad, "B, L, H, V", q.dtype)
    args.tensor("o", o, "B, L, H, V", q.dtype)
    args.tensor("lse", lse, "0, H, L" if options[-1] else "B, H, L", wide(q.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, seed, *ctx.options = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, segments, seed)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = ctx.backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, None, None, None, None, None


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
    check=_check_backward,
)
_attention = library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    attention_reference,
    fake=_fake,
    setup_context=_save,
    backward=_gradients,
    check=functools.partial(_check, _NAME),
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
