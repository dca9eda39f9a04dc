"""The reference of BitNet b1.58: against its definition, packing, exact sums, gradients, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops import bitlinear, bitlinear_packed, pack_ternary
from ultrazoo.ops.bitlinear.op import SPECS
from ultrazoo.ops.bitlinear.reference import bitlinear_ste, pack, quantize, ternarize, unpack
from ultrazoo.ops.library import kernel_policy
from ultrazoo.spec import Sample

CPU = torch.device("cpu")
TRAIN, PACKED = SPECS
SAMPLES = list(TRAIN.samples(CPU, torch.float64))
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with kernel_policy("reference"):
        yield


def sample_of(name: str, dtype: torch.dtype) -> Sample:
    return next(sample for sample in TRAIN.samples(CPU, dtype) if sample.name == name)


@every_sample
def test_output_and_straight_through_gradients_are_those_of_the_definition(sample: Sample) -> None:
    inputs = [x.detach().clone().requires_grad_() for x in sample.args]
    y, expected = bitlinear(*inputs, **sample.kwargs), bitlinear_ste(*inputs, **sample.kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradient_of_the_bias_by_differences() -> None:
    x, weight, bias = sample_of("L130, odd", torch.float64).args
    x = x[:, :5]
    assert torch.autograd.gradcheck(lambda b: bitlinear(x, weight, b), bias.requires_grad_())


def test_quantisers_by_hand() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5], [-0.5, 0.0, 3.0]])  # mean 1: halves go to the even neighbour, 0
    codes, scale = ternarize(weight, 1e-5)
    assert scale == 1 and codes.tolist() == [[1, -1, 0], [0, 0, 1]]
    integers, token_scale = quantize(torch.tensor([[127.0, 0.5, 1.5, -126.5], [0, 0, 0, 0]]), 1e-5)
    assert integers.tolist() == [[127, 0, 2, -126], [0, 0, 0, 0]]
    assert token_scale.flatten().tolist() == pytest.approx([1, 1e-5 / 127])


def test_a_master_weight_is_quantised_in_its_own_precision() -> None:
    weight = torch.tensor(
        [[0.501, 1.499], [1.0, -1.0]], requires_grad=True
    )  # in bfloat16 0.501 is 0.5, whose code is 0
    y = bitlinear(torch.eye(2, dtype=torch.bfloat16), weight)
    assert y.dtype == torch.bfloat16 and y.tolist() == [[1, 1], [1, -1]]
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and weight.grad.tolist() == [[1, 1], [1, 1]]


@every_sample
def test_packed_equals_unpacked(sample: Sample) -> None:
    x, weight, *bias = (x.float() for x in sample.args)
    trained = bitlinear(x, weight, *bias, **sample.kwargs)
    packed, scale = pack_ternary(weight, **sample.kwargs)
    assert packed.numel() == 64 * -(-weight.shape[0] // 16) * -(-weight.shape[1] // 16)
    assert torch.equal(bitlinear_packed(x, packed, scale, *bias, **sample.kwargs), trained)


def test_layout_is_the_documented_one() -> None:
    codes = torch.randint(-1, 2, (37, 50), generator=torch.Generator().manual_seed(0))
    packed = pack(codes)
    assert packed.shape == (3, 4, 64)
    for row, column in ((0, 0), (1, 0), (0, 1), (15, 15), (16, 16), (36, 49), (20, 37)):
        i, r = divmod(row, 16)
        j, rest = divmod(column, 16)
        s, b = divmod(rest, 4)
        assert (int(packed[i, j, 4 * r + b]) >> 2 * s & 3) - 1 == codes[row, column]
    assert torch.equal(unpack(packed, 37, 50), codes.to(torch.int8))
    assert unpack(packed, 48, 64)[37:].abs().sum() == 0 and unpack(packed, 48, 64)[:, 50:].abs().sum() == 0


def test_sums_are_exact_at_the_largest_integers() -> None:
    x = torch.tensor([[1.0] * 150_001]).mul_(127)
    weight = torch.ones(2, 150_001)
    weight[1, 1::2] = -1
    packed, scale = pack_ternary(weight)
    y = bitlinear_packed(x.double(), packed, scale)
    assert y.tolist() == [[127.0 * 150_001, 127.0]]
    sample = next(s for s in PACKED.samples(CPU, torch.float32) if s.name == "largest sums")
    assert bitlinear_packed(*sample.args).unique().tolist() == pytest.approx([2000.0])


def test_quantisation_costs_what_eight_bits_and_a_sign_cost() -> None:
    """Ternary weights by construction: only the activations' rounding is left, at most half a step of each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (24, 64), generator=generator)]
    x = torch.randn(5, 64, generator=generator)
    error = (bitlinear(x, weight) - F.linear(x, weight)).abs().amax(1)
    step = x.abs().amax(1) / 127
    assert (error <= 64 * step / 2).all() and error.max() > 0


@pytest.mark.parametrize("name", ["vector", "B0", "strided", "no bias"])
def test_opcheck(name: str) -> None:
    x, weight, *bias = (x.detach().clone().requires_grad_() for x in sample_of(name, torch.float32).args)
    args = (x, weight, bias[0] if bias else None, 1e-5)
    for op in (torch.ops.ultrazoo.bitlinear.default, torch.ops.ultrazoo.bitlinear.reference):
        torch.library.opcheck(op, args)
    packed = pack_ternary(weight)
    torch.library.opcheck(torch.ops.ultrazoo.bitlinear_packed.default, (x.detach(), *packed, None, 1e-5))


def test_compiles_as_one_graph() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        packed = pack_ternary(weight)
        return bitlinear(x * 2, weight, bias).sin().sum() + bitlinear_packed(x.detach(), *packed, bias.detach()).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in sample_of("L63", torch.float32).args]
        value = function(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(dtype: torch.dtype) -> None:
    for scale in (1e-3, 1.0, 300.0):
        x, weight, bias = (x.detach().clone() for x in sample_of("L63", dtype).args)
        inputs = [(x * scale).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = bitlinear(*inputs)
        exact = bitlinear_ste(*(x.detach().float() for x in inputs))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-2 * scale)
        y.float().square().mean().backward()
        assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in inputs)


def test_inputs_are_left_alone_and_two_runs_are_equal() -> None:
    sample = sample_of("L130, odd", torch.float32)
    before = [x.clone() for x in sample.args]
    assert torch.equal(bitlinear(*sample.args), bitlinear(*sample.args))
    pack_ternary(sample.args[1])
    assert all(torch.equal(a, b) for a, b in zip(before, sample.args, strict=True))


@pytest.mark.parametrize(
    ("function", "args", "error", "message"),
    [
        (
            bitlinear,
            (torch.zeros(2, 5), torch.zeros(3, 4)),
            ValueError,
            r"x: got shape \(2, 5\), expected \(..., K\) with K 4",
        ),
        (bitlinear, (torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(4)), ValueError, r"bias: got shape \(4,\)"),
        (bitlinear, (torch.zeros(2, 4), torch.zeros(4)), ValueError, r"weight: got shape \(4,\), expected \(N, K\)"),
        (bitlinear, (torch.zeros(2, 4).int(), torch.zeros(3, 4)), TypeError, "x: got torch.int32"),
        (bitlinear, (torch.zeros(2, 4), torch.zeros(3, 4, device="meta")), ValueError, "weight: got meta"),
        (pack_ternary, (torch.zeros(3, 0),), ValueError, "K: got 0"),
        (
            bitlinear_packed,
            (torch.zeros(2, 40), *pack_ternary(torch.ones(3, 20))),
            ValueError,
            r"packed: got shape \(1, 2, 64\), .* with ceil\(N / 16\) 1, ceil\(K / 16\) 3",
        ),
        (
            bitlinear_packed,
            (torch.zeros(2, 4, requires_grad=True), *pack_ternary(torch.ones(3, 4))),
            ValueError,
            "train",
        ),
    ],
)
def test_bad_arguments_are_named(function: Any, args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(*args)
