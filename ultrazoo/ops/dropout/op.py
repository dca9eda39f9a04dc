"""``dropout``: inverted dropout by a counter-based generator, nothing kept for the backward but a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops import library
from ultrazoo.ops.arguments import Arguments
from ultrazoo.ops.dropout.reference import dropout_reference
from ultrazoo.ops.philox import draw_seed, kept_of_65536
from ultrazoo.spec import Cost, OpSpec, Sample

_NAME = "ultrazoo::dropout"


def dropout(x: Tensor, p: float, *, seed: Tensor | None = None) -> Tensor:
    """y = x / keep with probability keep, else 0; keep is 1 - p rounded to a multiple of 1 / 65536, but never 0.

    The mask is a function of the seed and of the place of the element (Philox4x32-10, 16 bits an element), the same
    for every instruction set, number of threads and dtype. The backward draws it again.

    Args:
        x: (...) of any floating-point dtype.
        p: Probability of dropping, in [0, 1); with 0 the result is x itself.
        seed: 0-dim int64; None draws one from torch's global generator of the CPU, and none where p is 0.

    Returns:
        Like x, contiguous. A dropped element is 0 even where x is not finite.

    Raises:
        ValueError: p or the seed does not fit.
        TypeError: x is not floating-point.
    """
    keep = _keep(x, p, seed)
    if p == 0:
        return x
    result: Tensor = _dropout(x, draw_seed() if seed is None else seed, keep)
    return result


def _reference(x: Tensor, p: float, *, seed: Tensor | None = None) -> Tensor:
    """``dropout`` by its reference, whatever the kernel policy."""
    keep = _keep(x, p, seed)
    if p == 0:
        return x
    result: Tensor = _dropout.reference(x, draw_seed() if seed is None else seed, keep)
    return result


def _keep(x: Tensor, p: float, seed: Tensor | None) -> int:
    """Check what the op does not, and return the probability of keeping in 65536ths."""
    if not 0 <= p < 1:
        raise ValueError(f"{_NAME}: p: got {p}, expected a probability in [0, 1); 1 would leave nothing")
    keep = kept_of_65536(p)
    if p == 0:  # no op is called
        _check(x, torch.zeros((), dtype=torch.int64) if seed is None else seed, keep)
    return keep


def _check(x: Tensor, seed: Tensor, keep: int) -> None:
    args = Arguments(_NAME, x)
    args.tensor("x", x, "...")
    args.tensor("seed", seed, "", torch.int64, devices=(torch.device("cpu"),))
    args.number("keep", keep, 1, 65536)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.keep = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return ctx.backward_op(grad, seed, ctx.keep), None, None


def _second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return _dropout_backward(grad, seed, ctx.keep), None, None


_dropout_backward = library.define(
    "dropout_backward(Tensor grad, Tensor seed, int keep) -> Tensor",
    dropout_reference,
    fake=lambda grad, *_: grad.new_empty(grad.shape),
    setup_context=_save,
    backward=_second_gradient,
    check=_check,
)
_dropout = library.define(
    "dropout(Tensor x, Tensor seed, int keep) -> Tensor",
    dropout_reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=_save,
    backward=_gradient,
    check=_check,
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    seed = torch.tensor(-0x0123456789ABCDEF)
    for shape in ((), (1,), (3, 7), (0, 5), (128,), (2, 63, 5), (2, 130, 129)):
        yield Sample(name="x".join(map(str, shape)) or "scalar", args=(draw(*shape), 0.25), kwargs={"seed": seed})
    other = {"seed": torch.tensor(3)}
    yield Sample(name="p 1e-9", args=(draw(5, 6), 1e-9), kwargs=other)
    yield Sample(name="p 0.999999", args=(draw(50, 60), 0.999999), kwargs=other)
    yield Sample(name="transposed", args=(draw(2, 5, 33).mT, 0.1), kwargs=other)
    yield Sample(name="every other", args=(draw(3, 66)[:, ::2], 0.5), kwargs=other)
    yield Sample(name="unaligned", args=(draw(131)[1:], 0.9), kwargs=other)
    yield Sample(name="expanded", args=(draw(17).expand(4, 17), 0.5), kwargs=other)


def _bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for shape in ((4096, 312), (2048, 768)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        yield Sample(name="x".join(map(str, shape)), args=(x, 0.1))


def _cost(sample: Sample) -> Cost:
    x: Tensor = sample.args[0]
    return Cost(flops=x.numel(), bytes=2 * x.numel() * x.element_size())


def _torch_dropout(x: Tensor, p: float, *, seed: Tensor | None = None) -> Tensor:
    """The same distribution, from torch's generator."""
    return F.dropout(x, p)


SPEC = OpSpec(
    name="ultrazoo::dropout",
    op=dropout,
    reference=_reference,
    samples=_samples,
    bench_samples=_bench_samples,
    cost=_cost,
    baselines={"torch": _torch_dropout},
)
SPECS = (SPEC,)
