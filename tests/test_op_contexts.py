"""Every op under autocast, inference mode, vmap, deterministic algorithms, other default dtypes and forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ultrazoo.errors import KernelUnavailableError
from ultrazoo.ops import (
    attention,
    bitlinear,
    bitlinear_packed,
    dropout,
    kernel_policy,
    library,
    pack_ternary,
    retention,
    rk4_stage,
    selective_scan,
)
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec, Sample
from ultrazoo.testing.measure import call, named_arguments

CPU = torch.device("cpu")
SPECS = {name: spec for name, spec in registry().ops().items() if name.startswith("ultrazoo::")}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def _policy(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernel_policy(request.param):
        yield


def sample_of(spec: OpSpec, dtype: torch.dtype = torch.float32) -> Sample:
    """The largest of the op's samples that has numbers."""
    return max(spec.samples(CPU, dtype), key=lambda sample: sum(x.numel() for x in _tensors(sample)))


def _tensors(sample: Sample) -> list[Tensor]:
    return [x for x in (*sample.args, *sample.kwargs.values()) if isinstance(x, Tensor)]


def gradients(
    spec: OpSpec,
    sample: Sample,
    forward: AbstractContextManager[Any],
    backward: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """The op's result and gradients, the forward in one context, the backward in another or in the same."""
    given = named_arguments(spec, sample)
    for name, x in given.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            given[name] = x.detach().clone().requires_grad_(spec.differentiable and name not in spec.constants)
    wrt = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]

    def differentiate() -> list[Tensor]:
        weight = torch.linspace(-1, 1, max(1, y.numel()), dtype=torch.float32)[: y.numel()].reshape(y.shape)
        return list(torch.autograd.grad(y, wrt, weight.to(y.dtype))) if wrt else []

    with forward:
        y = call(spec, given)
        if backward is None:
            return [y, *differentiate()]
    with backward:
        return [y, *differentiate()]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(spec: OpSpec, dtype: torch.dtype) -> None:
    sample = sample_of(spec, dtype)
    expected = gradients(spec, sample, nullcontext())
    for to in (torch.bfloat16, torch.float16):
        assert_equal(gradients(spec, sample, torch.autocast("cpu", to)), expected)  # the backward within
        assert_equal(gradients(spec, sample, torch.autocast("cpu", to), nullcontext()), expected)
        assert_equal(gradients(spec, sample, nullcontext(), torch.autocast("cpu", to)), expected)


def test_the_backward_of_bitlinear_under_autocast_writes_where_it_may() -> None:
    """The call of the report, whose backward wrote fp32 numbers into a bf16 buffer."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 768, generator=generator, requires_grad=True) for n in (512, 768))
    expected = torch.autograd.grad(bitlinear(x, w).sum(), (x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bitlinear(x, w).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])  # type: ignore[arg-type]


def test_raw_ops_exclude_autocast_too() -> None:
    x, w = torch.randn(9, 32), torch.randn(16, 32)
    for op in (torch.ops.ultrazoo.bitlinear_backward.default, torch.ops.ultrazoo.bitlinear_backward.reference):
        arguments = (torch.randn(9, 16), torch.ones(9, 32, dtype=torch.int8), torch.rand(9, 1), w, 1e-5)
        expected = op(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(list(op(*arguments)), list(expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ w.mT).dtype == torch.bfloat16  # autocast is on again


def test_autocast_in_a_compiled_graph() -> None:
    x, w = torch.randn(9, 32, requires_grad=True), torch.randn(16, 32)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return bitlinear(x, w).sum()

    expected = torch.autograd.grad(loss(x), x)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.equal(got[0], expected[0])


square = library.define("test_square(Tensor x) -> Tensor", lambda x: x @ x, fake=torch.empty_like)
"""An op as a plugin may define it, whose reference knows nothing of autocast."""


def test_an_op_of_any_library_excludes_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), kernel_policy("auto"):
        assert square(torch.eye(3)).dtype == square.reference(torch.eye(3)).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="test_square has no derivative"), kernel_policy("auto"):
        square(torch.eye(3, requires_grad=True)).sum().backward()


@each_spec
def test_inference_mode_changes_no_bit(spec: OpSpec) -> None:
    sample = sample_of(spec)
    with torch.inference_mode():
        got = call(spec, named_arguments(spec, sample))
    assert torch.equal(got, gradients(spec, sample, nullcontext())[0])


@each_spec
def test_deterministic_algorithms_which_fill_new_memory_change_no_bit(spec: OpSpec) -> None:
    sample = sample_of(spec)
    expected = gradients(spec, sample, nullcontext())
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        got = gradients(spec, sample, nullcontext())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(got, expected)


@each_spec
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_bit(spec: OpSpec, default: torch.dtype) -> None:
    sample = sample_of(spec)
    expected = gradients(spec, sample, nullcontext())
    torch.set_default_dtype(default)
    try:
        got = gradients(spec, sample, nullcontext())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(got, expected)


@each_spec
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_equals_calls_one_by_one(spec: OpSpec) -> None:
    sample = sample_of(spec)
    given = named_arguments(spec, sample)
    lead = next(iter(given))
    batch = torch.stack([given[lead], given[lead].flip(0) * 0.5, given[lead] * 0 + 1])
    got = torch.vmap(lambda x: call(spec, {**given, lead: x}))(batch)
    assert torch.equal(got, torch.stack([call(spec, {**given, lead: x}) for x in batch]))


@each_spec
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_has_gradients_and_torch_func_is_refused_by_name(spec: OpSpec) -> None:
    if not spec.differentiable:
        return
    given = named_arguments(spec, sample_of(spec))
    lead = next(iter(given))

    def total(x: Tensor) -> Tensor:
        result: Tensor = call(spec, {**given, lead: x}).sum()
        return result

    batch = torch.stack([given[lead], given[lead] * 0.5]).requires_grad_()
    (got,) = torch.autograd.grad(torch.vmap(total)(batch).sum(), batch)
    (want,) = torch.autograd.grad(torch.stack([total(x) for x in batch]).sum(), batch)
    assert torch.equal(got, want)
    with pytest.raises(NotImplementedError, match=f"{spec.name}.*torch.func.grad"):
        torch.func.grad(total)(given[lead])


@each_spec
def test_forward_mode_is_refused(spec: OpSpec) -> None:
    sample = sample_of(spec)
    given = named_arguments(spec, sample)
    for name, x in given.items():
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            continue

        def function(x: Tensor, name: str = name) -> Tensor:
            result: Tensor = call(spec, {**given, name: x})
            return result

        with pytest.raises(NotImplementedError, match=f"{spec.name}.*forward-mode AD"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with pytest.raises(NotImplementedError, match="forward-mode AD"), forward_ad.dual_level():
            function(forward_ad.make_dual(x, torch.ones_like(x)))
        if spec.differentiable and name not in spec.constants:
            with pytest.raises(NotImplementedError, match="forward-mode AD"), forward_ad.dual_level():
                function(forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))


@each_spec
def test_forward_over_reverse_is_refused(spec: OpSpec) -> None:
    """A tangent that only the gradient has: the backward op refuses it, or the formula of plain torch is right."""
    if not spec.differentiable:
        with pytest.raises(NotImplementedError, match="has no derivative"):
            _packed_with_gradient()
        return
    sample = sample_of(spec)
    given = named_arguments(spec, sample)
    lead = next(iter(given))
    x = given[lead].detach().clone().requires_grad_()
    y = call(spec, {**given, lead: x})
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 0.5))
        if spec.name.startswith("ultrazoo::rk4"):
            (dx,) = torch.autograd.grad(y, x, grad)
            assert torch.equal(forward_ad.unpack_dual(dx).tangent, torch.full_like(x, 0.5))
        else:
            with pytest.raises(NotImplementedError, match=r"_backward.*forward-mode AD"):
                torch.autograd.grad(y, x, grad)


def _packed_with_gradient() -> None:
    packed, scale = pack_ternary(torch.randn(3, 8))
    bitlinear_packed(torch.randn(2, 8), packed, scale.requires_grad_()).sum().backward()


@each_spec
def test_second_derivatives_are_right_or_refused(spec: OpSpec) -> None:
    if not spec.differentiable:
        return
    sample = sample_of(spec)
    given = named_arguments(spec, sample)
    lead = next(iter(given))
    x = given[lead].detach().clone().requires_grad_()
    y = call(spec, {**given, lead: x})
    grad = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
    if spec.name in (
        "ultrazoo::dropout",
        "ultrazoo::rk4_combine",
        "ultrazoo::rk4_stage",
    ):  # linear: dx is of grad alone
        (again,) = torch.autograd.grad(dx.sum(), grad)
        zero = call(spec, {**given, lead: torch.zeros_like(x)})
        assert torch.allclose(again, call(spec, {**given, lead: torch.ones_like(x)}) - zero, atol=1e-6)
    else:
        with pytest.raises(NotImplementedError, match=f"{spec.name} has no second derivative"):
            torch.autograd.grad(dx.sum(), grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_weight_a_bias_or_a_slope_of_another_dtype_works(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(5, 32), torch.randn(16, 32).to(dtype), torch.randn(16).to(dtype)
    results = []
    for policy in ("auto", "reference"):
        leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        with kernel_policy(policy):  # type: ignore[arg-type]
            y = bitlinear(x, *leaves)
            y.sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves), rk4_stage(x, weight[:5], 0.5)])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype.itemsize == 2 else 1e-4, atol=1e-4)
    assert [a.dtype for a in results[0] if a is not None] == [torch.float32, dtype, dtype, torch.float32]


def test_compiled_alone_refuses_fp64_beside_fp32() -> None:
    x, w = torch.randn(5, 32), torch.randn(16, 32)
    with kernel_policy("compiled"):
        for call_it in (
            lambda: bitlinear(x, w.double()),
            lambda: bitlinear(x, w, torch.randn(16).double()),
            lambda: bitlinear_packed(x, *pack_ternary(w), torch.randn(16).double()),
            lambda: rk4_stage(x, x.double(), 0.5),
        ):
            with pytest.raises(KernelUnavailableError, match=r"no compiled kernel .* not torch\.float64"):
                call_it()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_no_op_takes_are_refused_by_name(dtype: torch.dtype) -> None:
    """Under the kernel and the reference alike: the fixture picks one."""
    x, w = torch.randn(5, 32), torch.randn(16, 32)
    packed, scale = pack_ternary(w)
    q, decay = torch.randn(1, 4, 2, 8), -torch.rand(2)
    scan = [torch.randn(1, 4, 8), torch.randn(1, 4, 8), -torch.rand(8, 2), torch.randn(1, 4, 2), torch.randn(1, 4, 2)]
    calls: dict[str, Callable[[], Any]] = {
        "weight": lambda: bitlinear(x, w.to(dtype)),
        "bias": lambda: bitlinear(x, w, torch.ones(16).to(dtype)),
        "scale": lambda: bitlinear_packed(x, packed, scale.to(dtype)),
        "k": lambda: rk4_stage(x, x.to(dtype), 0.5),
        "x": lambda: dropout(x.to(dtype), 0.5),
        "v": lambda: retention(q, q, q.to(dtype), decay),
        "log_decay": lambda: retention(q, q, q, decay.to(dtype)),
        "q": lambda: attention(q.to(dtype), q, q),
        "A": lambda: selective_scan(*scan[:2], scan[2].to(dtype), *scan[3:]),
    }
    for name, call_it in calls.items():
        with pytest.raises(TypeError, match=f"ultrazoo::.*: {name}: got {dtype}"):
            call_it()


def test_meta_and_fake_tensors_hide_no_error() -> None:
    x, w = torch.randn(5, 32, device="meta"), torch.randn(16, 31, device="meta")
    for op in (torch.ops.ultrazoo.bitlinear.default, torch.ops.ultrazoo.bitlinear.reference):
        with pytest.raises(ValueError, match=r"x: got shape \(5, 32\), expected \(\.\.\., K\) with K 31"):
            op(x, w, None, 1e-5)
        with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match=r"eps: got 0\.0"):
            op(torch.randn(5, 31), torch.randn(16, 31), None, 0.0)
