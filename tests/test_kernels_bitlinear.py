"""The compiled BitNet products at the edges of their tiles, exact in integers, in every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_parts import each_isa, hold

from ultrazoo.ops import bitlinear, bitlinear_packed, kernel_policy, pack_ternary
from ultrazoo.ops.bitlinear.reference import pack, quantize, ternarize, unpack
from ultrazoo.ops.loader import use_cpu_isa
from ultrazoo.spec import Sample

every_isa = each_isa("bitlinear_packed")
SHAPES = [(1, 16, 16), (1, 1, 33), (2, 17, 15), (3, 15, 17), (5, 33, 64), (7, 70, 5), (12, 64, 32), (13, 65, 31)]
SHAPES += [(23, 96, 40), (97, 20, 66), (100, 130, 7)]


def packed(dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    for m, k, n in SHAPES:
        x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((m, k), (n, k), (n,)))
        yield Sample(name=f"M{m} K{k} N{n}", args=(x, *pack_ternary(weight), bias))


def trained(dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    for m, k, n in SHAPES:
        x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((m, k), (n, k), (n,)))
        yield Sample(name=f"M{m} K{k} N{n}", args=(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_isa
def test_edges(isa: str, dtype: torch.dtype) -> None:
    hold("bitlinear_packed", packed, isa, dtype)
    hold("bitlinear", trained, isa, dtype)


@every_isa
@pytest.mark.parametrize("k", [16, 2000, 70_001])
def test_the_largest_sums_are_exact(isa: str, k: int) -> None:
    """Integers of 127 and -127 on codes of one sign: the most that any sum can come to."""
    x = torch.ones(14, k)
    x[1::2] = -1
    codes = torch.ones(19, k, dtype=torch.int8)
    codes[::3] = -1
    with use_cpu_isa(isa), kernel_policy("compiled"):
        y = bitlinear_packed(x * 127, pack(codes), torch.ones(19))
    exact = (x * 127).to(torch.int64) @ codes.to(torch.int64).mT
    assert torch.equal(y, exact.to(torch.float32))


@every_isa
def test_sums_of_random_integers_are_exact(isa: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, codes = torch.randint(-127, 128, (29, 333), generator=g), torch.randint(-1, 2, (45, 333), generator=g)
    x[:, 5] = 127  # so that the scale of each token is 1
    with use_cpu_isa(isa), kernel_policy("compiled"):
        y = bitlinear_packed(x.float(), pack(codes.to(torch.int8)), torch.ones(45))
    assert torch.equal(y.long(), x @ codes.mT)


@every_isa
def test_integers_and_codes_are_those_of_the_reference(isa: str) -> None:
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(9, 75, generator=g), torch.randn(21, 75, generator=g)
    with use_cpu_isa(isa):
        _, integers, scale = torch.ops.ultrazoo.bitlinear(x, weight, None, 1e-5)
    expected, expected_scale = quantize(x, 1e-5)
    assert torch.equal(integers, expected.to(torch.int8))
    torch.testing.assert_close(scale, expected_scale, rtol=2e-7, atol=0)
    assert torch.equal(unpack(*(pack_ternary(weight)[0], 21, 75)), ternarize(weight, 1e-5)[0].to(torch.int8))


@every_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others_alone(isa: str, bad: float) -> None:
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(5, 37, generator=g), torch.randn(19, 37, generator=g)
    with use_cpu_isa(isa), kernel_policy("compiled"):
        clean = bitlinear(x, weight), bitlinear_packed(x, *pack_ternary(weight))
        x[1, 3] = x[3, 36] = bad
        dirty = bitlinear(x, weight), bitlinear_packed(x, *pack_ternary(weight))
    for before, after in zip(clean, dirty, strict=True):
        assert after[[1, 3]].isnan().all() and torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])


@every_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_gives_no_number(isa: str, bad: float) -> None:
    x, weight = torch.ones(3, 20), torch.ones(4, 20)
    weight[2, 19] = bad
    with use_cpu_isa(isa), kernel_policy("compiled"):
        assert not bitlinear(x, weight).isfinite().any()


def test_more_columns_than_int32_can_sum_up_are_refused() -> None:
    many = 2**31 // 256
    x = torch.zeros(1, 1).expand(1, many)
    scale, codes = torch.ones(1), torch.zeros(1, 1, 64, dtype=torch.uint8).expand(1, many // 16, 64)
    with kernel_policy("compiled"), pytest.raises(ValueError, match=r"K: got 8388608, expected 1 to 8388607"):
        bitlinear_packed(x, codes, scale)
