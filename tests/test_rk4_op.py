"""rk4_combine and rk4_stage: the kernels against the references, on every instruction set of this CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo.errors import KernelUnavailableError
from ultrazoo.ops import build, kernel_policy, kernel_status, rk4_combine, rk4_stage
from ultrazoo.ops.loader import use_cpu_isa
from ultrazoo.ops.rk4.op import SPECS
from ultrazoo.spec import OpSpec, Sample

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name.split("::")[1])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def compiled() -> Iterator[None]:
    """The kernels, which have to be there: without this the reference would be compared with itself."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(error.reason)
    for spec in SPECS:
        status = kernel_status(spec.name, "cpu")
        assert status.compiled, status.detail
    with kernel_policy("compiled"):
        yield


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, compiled: None) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(use_cpu_isa(request.param))
        except KernelUnavailableError as error:
            pytest.skip(str(error))
        yield request.param


def widen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) else x for x in args)


def assert_as_good_as(got: Tensor, same_dtype: Tensor, exact: Tensor, factor: float) -> None:
    """The kernel's error is at most ``factor`` times that of the reference in the same dtype, plus a rounding."""
    assert (got.shape, got.dtype, got.stride()) == (same_dtype.shape, same_dtype.dtype, same_dtype.stride())
    if exact.numel():
        floor = torch.finfo(got.dtype).eps * exact.abs().max()
        allowed = factor * (same_dtype.double() - exact).abs().max() + floor
        assert (got.double() - exact).abs().max() <= allowed


def gradients(function: Any, sample: Sample) -> list[Tensor]:
    args = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in sample.args]
    tensors = [x for x in args if isinstance(x, Tensor)]
    out = function(*args)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return list(torch.autograd.grad(out, tensors, weights))


@each_dtype
@each_spec
def test_forward_and_gradients_are_as_good_as_the_reference(spec: OpSpec, dtype: torch.dtype, isa: str) -> None:
    for sample in spec.samples(CPU, dtype):
        before = [x.clone() for x in sample.args if isinstance(x, Tensor)]
        got = spec.op(*sample.args)
        assert_as_good_as(got, spec.reference(*sample.args), spec.reference(*widen(sample.args)), 2)
        assert torch.equal(got, spec.op(*sample.args))
        assert all(torch.equal(x, y) for x, y in zip(sample.args, before, strict=False))
        wide = Sample(name=sample.name, args=widen(sample.args))
        grads = zip(gradients(spec.op, sample), gradients(spec.reference, sample), strict=True)
        for (grad, same_dtype), exact in zip(grads, gradients(spec.reference, wide), strict=True):
            assert_as_good_as(grad, same_dtype, exact, 3)


@pytest.mark.parametrize("twin", ["default", "reference"])
@each_spec
def test_opcheck(spec: OpSpec, twin: str, compiled: None) -> None:
    op = getattr(getattr(torch.ops.ultrazoo, spec.name.split("::")[1]), twin)
    for sample in (s for s in spec.samples(CPU, torch.float32) if s.name in {"transposed", "0x5", "expanded slopes"}):
        args = tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in sample.args)
        torch.library.opcheck(op, args)


@each_spec
def test_gradients_and_second_gradients_in_float64(spec: OpSpec) -> None:
    for sample in spec.samples(CPU, torch.float64):
        args = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in sample.args)
        if 0 < args[0].numel() < 100:
            assert torch.autograd.gradcheck(spec.op, args)
            assert torch.autograd.gradgradcheck(spec.op, args)


@each_spec
def test_threads_do_not_change_the_bits(spec: OpSpec, compiled: None) -> None:
    sample = next(iter(spec.bench_samples(CPU, torch.float32)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = spec.op(*sample.args)
        torch.set_num_threads(2)
        assert torch.equal(alone, spec.op(*sample.args))
    finally:
        torch.set_num_threads(threads)


def test_the_sums_are_those_of_the_classic_rule() -> None:
    h, k1, k2, k3, k4 = torch.eye(5, dtype=torch.float64)
    expected = torch.tensor([1, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(rk4_combine(h, k1, k2, k3, k4, 0.6), expected)
    torch.testing.assert_close(rk4_stage(h, k1, -0.5), torch.tensor([1, -0.5, 0, 0, 0], dtype=torch.float64))


def test_low_precision_sums_are_rounded_once(isa: str) -> None:
    h = torch.full((40,), 256.0, dtype=torch.bfloat16)
    k = torch.full((40,), 2.0, dtype=torch.bfloat16)  # bf16 has steps of 2 at 256: three rounded sums would lose it
    assert torch.equal(rk4_combine(h, k, k, k, k, 1.0), torch.full_like(h, 258.0))


@each_spec
def test_compile_in_one_graph(spec: OpSpec, compiled: None) -> None:
    sample = next(s for s in spec.samples(CPU, torch.float32) if s.name == "transposed")
    function = torch.compile(lambda *args: spec.op(*args).sin(), fullgraph=True, backend="aot_eager")
    expected_grads = gradients(lambda *args: spec.op(*args).sin(), sample)
    for grad, expected in zip(gradients(function, sample), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected)


def test_a_step_under_autocast_keeps_a_wide_state() -> None:
    linear, h = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        k = linear(h)
        out = rk4_combine(h, k, k, k, linear(rk4_stage(h, k, 0.5)), 1.0)
    assert (k.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    out.sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.abs().sum() > 0


def test_arguments_that_do_not_fit_are_refused() -> None:
    h = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rk4_stage: k: got shape \(3,\), expected \(...\) with ... \(2, 3\)"):
        rk4_stage(h, torch.zeros(3), 1.0)
    with pytest.raises(TypeError, match=r"rk4_combine: k3: got torch.float16"):
        rk4_combine(h, h, h, h.half(), h, 1.0)


def test_the_kernels_refuse_what_they_cannot_read(compiled: None) -> None:
    op = torch.ops.ultrazoo.rk4_stage.default
    with pytest.raises(RuntimeError, match=r"rk4_stage: k: got shape \(4,\)"):
        op(torch.zeros(8), torch.zeros(4), 1.0)
    with pytest.raises(RuntimeError, match="rk4_stage: h: got dtype float64"):
        op(torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64), 1.0)


@each_spec
def test_cost_counts_every_tensor_once(spec: OpSpec) -> None:
    sample = next(iter(spec.bench_samples(CPU, torch.bfloat16)))
    cost = spec.cost(sample)
    tensors = sum(isinstance(x, Tensor) for x in sample.args) + 1
    assert cost.bytes == tensors * 2048 * 768 * 2
    assert cost.flops % (2048 * 768) == 0 and cost.flops > 0
