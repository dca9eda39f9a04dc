"""``rk4_combine`` and ``rk4_stage``: the sums of a classic Runge-Kutta step, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ultrazoo.ops import library
from ultrazoo.ops.arguments import MOST, Arguments
from ultrazoo.ops.rk4.reference import rk4_combine_reference, rk4_stage_reference
from ultrazoo.spec import Cost, OpSpec, Sample


def rk4_combine(h: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, k4: Tensor, dt: float) -> Tensor:
    """h + dt / 6 * (k1 + 2 k2 + 2 k3 + k4), the end of a classic Runge-Kutta step.

    The sum is taken in fp32 whatever the dtypes, and rounded once.

    Args:
        h: (...) state at the start of the step.
        k1: (...) slope at the start; the four slopes share one dtype, which may be narrower than that of h.
        k2: (...) first slope at the middle.
        k3: (...) second slope at the middle.
        k4: (...) slope at the end.
        dt: Length of the step.

    Returns:
        (...) state at the end of the step, contiguous, in the dtype of h.

    Raises:
        ValueError: Shapes or devices differ, or dt is not finite.
        TypeError: A dtype is not floating-point, or those of the slopes differ.
    """
    result: Tensor = _combine(h, k1, k2, k3, k4, dt)
    return result


def rk4_stage(h: Tensor, k: Tensor, c: float) -> Tensor:
    """h + c * k, the state at which the next slope is taken.

    The sum is taken in fp32 whatever the dtypes, and rounded once.

    Args:
        h: (...) state at the start of the step.
        k: (...) slope, whose dtype may be narrower than that of h.
        c: Length of the way along the slope.

    Returns:
        (...) state, contiguous, in the dtype of h.

    Raises:
        ValueError: Shapes or devices differ, or c is not finite.
        TypeError: A dtype is not floating-point.
    """
    result: Tensor = _stage(h, k, c)
    return result


def _check_combine(h: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, k4: Tensor, dt: float) -> None:
    args = Arguments("ultrazoo::rk4_combine", h)
    args.tensor("h", h, "...")
    args.tensor("k1", k1, "...")
    for name, k in (("k2", k2), ("k3", k3), ("k4", k4)):
        args.tensor(name, k, "...", k1.dtype)
    args.number("dt", dt, -MOST, MOST)


def _check_stage(h: Tensor, k: Tensor, c: float) -> None:
    args = Arguments("ultrazoo::rk4_stage", h)
    args.tensor("h", h, "...")
    args.tensor("k", k, "...")
    args.number("c", c, -MOST, MOST)


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dt, ctx.slope_dtype = inputs[5], inputs[1].dtype


def _combine_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad
    outer = (ctx.dt / 6 * grad).to(ctx.slope_dtype) if need[1] or need[4] else None
    inner = (ctx.dt / 3 * grad).to(ctx.slope_dtype) if need[2] or need[3] else None
    return grad, outer, inner, inner, outer, None


def _save_stage(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.c, ctx.slope_dtype = inputs[2], inputs[1].dtype


def _stage_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, (ctx.c * grad).to(ctx.slope_dtype) if ctx.needs_input_grad[1] else None, None


_combine = library.define(
    "rk4_combine(Tensor h, Tensor k1, Tensor k2, Tensor k3, Tensor k4, float dt) -> Tensor",
    rk4_combine_reference,
    fake=lambda h, *_: h.new_empty(h.shape),
    setup_context=_save_combine,
    backward=_combine_gradients,
    typed=("k1",),
    check=_check_combine,
)
_stage = library.define(
    "rk4_stage(Tensor h, Tensor k, float c) -> Tensor",
    rk4_stage_reference,
    fake=lambda h, *_: h.new_empty(h.shape),
    setup_context=_save_stage,
    backward=_stage_gradients,
    typed=("k",),
    check=_check_stage,
)


def _samples(tensors: int) -> Callable[[torch.device, torch.dtype], Iterator[Sample]]:
    """Calls with ``tensors`` tensors and one step."""

    def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        def draw(*shape: int, many: int = tensors) -> list[Tensor]:
            return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(many)]

        generator = torch.Generator().manual_seed(0)
        for shape in ((), (1,), (3, 7), (0, 5), (2, 63, 5), (2, 130, 129)):
            yield Sample(name="x".join(map(str, shape)) or "scalar", args=(*draw(*shape), 0.3))
        yield Sample(name="transposed", args=(*(x.mT for x in draw(2, 5, 33)), 0.3))
        yield Sample(name="every other", args=(*(x[:, ::2] for x in draw(3, 66)), 0.3))
        yield Sample(name="unaligned", args=(*(x[1:] for x in draw(131)), -0.5))
        slopes = (x.expand(4, 17) for x in draw(17, many=tensors - 1))
        yield Sample(name="expanded slopes", args=(*draw(4, 17, many=1), *slopes, 0.3))
        state = torch.randn(3, 70, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
        yield Sample(name="wide state", args=(state, *draw(3, 70, many=tensors - 1), 0.3))

    return samples


def _bench_samples(tensors: int) -> Callable[[torch.device, torch.dtype], Iterator[Sample]]:
    def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(0)
        for shape in ((2048, 768), (4096, 1024)):
            states = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(tensors))
            yield Sample(name="x".join(map(str, shape)), args=(*states, 0.25))

    return samples


def _cost(flops_per_element: int) -> Callable[[Sample], Cost]:
    def cost(sample: Sample) -> Cost:
        tensors = [x for x in sample.args if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in (*tensors, tensors[0]))  # the result is like the state
        return Cost(flops=flops_per_element * tensors[0].numel(), bytes=moved)

    return cost


def _eager_combine(h: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, k4: Tensor, dt: float) -> Tensor:
    return h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


SPECS = (
    OpSpec(
        name="ultrazoo::rk4_combine",
        op=rk4_combine,
        reference=rk4_combine_reference,
        samples=_samples(tensors=5),
        bench_samples=_bench_samples(tensors=5),
        cost=_cost(flops_per_element=7),
        baselines={"eager": _eager_combine},
    ),
    OpSpec(
        name="ultrazoo::rk4_stage",
        op=rk4_stage,
        reference=rk4_stage_reference,
        samples=_samples(tensors=2),
        bench_samples=_bench_samples(tensors=2),
        cost=_cost(flops_per_element=2),
        baselines={"eager": lambda h, k, c: h + c * k},
    ),
)
