"""The compiled selective scan at the edges of its chunks, vectors and groups, in every instruction set."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import each_isa, hold, random_segments

from ultrazoo.ops import build, kernel_policy, selective_scan
from ultrazoo.ops.loader import use_cpu_isa
from ultrazoo.spec import Sample

every_isa = each_isa("selective_scan")


def draw(name: str, B: int, L: int, D: int, N: int, dtype: torch.dtype, *, full: bool = True, **kwargs: Any) -> Sample:
    g = torch.Generator().manual_seed(B * L + D * N)
    u, z, delta = (torch.randn(B, L, D, generator=g).to(dtype) for _ in range(3))
    b, c = (torch.randn(B, L, N, generator=g).to(dtype) for _ in range(2))
    A, skip, bias = -4 * torch.rand(D, N, generator=g), torch.randn(D, generator=g), torch.randn(D, generator=g) - 2
    if not full:
        return Sample(name=name, args=(u, delta.sigmoid() / 4, A, b, c), kwargs=kwargs)
    kwargs |= {"z": z, "delta_bias": bias, "delta_softplus": True}
    return Sample(name=name, args=(u, delta, A, b, c, skip), kwargs=kwargs)


def sizes(dtype: torch.dtype) -> Iterator[Sample]:
    for D in (1, 3, 4, 5, 8, 15, 16, 17, 127, 128, 129, 300):
        yield draw(f"D{D}", 1, 34, D, 4, dtype, reverse=D % 2 == 0)
    for N in (1, 7, 8, 9, 15, 16, 17, 24, 33):
        yield draw(f"N{N}", 1, 34, 5, N, dtype, full=N % 2 == 0)
    for L in (1, 2, 31, 32, 33, 64, 65):
        for reverse in (False, True):
            yield draw(f"L{L}", 2, L, 6, 3, dtype, reverse=reverse)
    yield draw("D0", 2, 5, 0, 3, dtype)
    yield draw("N0", 2, 5, 3, 0, dtype)


def documents(dtype: torch.dtype) -> Iterator[Sample]:
    for seed in range(3):
        segments = random_segments(3, 150, seed)
        segments[2, 30:100] = 0  # a chunk of padding alone
        for reverse in (False, True):
            kwargs = {"segments": segments, "reverse": reverse}
            yield draw(f"documents {seed}", 3, 150, 70, 9, dtype, full=seed != 1, **kwargs)


@every_isa
@pytest.mark.parametrize("samples", [sizes, documents], ids=lambda f: f.__name__)
def test_edges(isa: str, samples: object) -> None:
    hold("selective_scan", samples, isa)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_isa
def test_edges_of_half_precision(isa: str, dtype: torch.dtype) -> None:
    hold("selective_scan", documents, isa, dtype)


@every_isa
def test_a_long_row_is_as_exact_as_a_short_one(isa: str) -> None:
    hold("selective_scan", lambda dtype: [draw("L5000", 1, 5000, 5, 4, dtype)], isa)


@every_isa
def test_a_nan_reaches_the_later_tokens_of_its_channel_and_document_alone(isa: str) -> None:
    sample = draw("", 1, 80, 20, 3, torch.float32, full=False)
    u, delta, *rest = sample.args
    segments = torch.tensor([[1] * 50 + [2] * 30])
    delta[0, 20, 17] = torch.nan
    with use_cpu_isa(isa), kernel_policy("compiled"):
        y = selective_scan(u, delta, *rest, segments=segments)
    expected = torch.zeros(1, 80, 20, dtype=torch.bool)
    expected[0, 20:50, 17] = True
    assert torch.equal(y.isnan(), expected)


@every_isa
def test_steps_past_the_largest_exponent_forget_everything(isa: str) -> None:
    """exp(delta A) is 0, not NaN, where delta A is below the range of fp32."""
    one = torch.ones(1, 6, 20)
    delta = one * 0.5
    delta[0, 3] = 1e37
    A, B = torch.full((20, 3), -1e3), torch.ones(1, 6, 3)
    with use_cpu_isa(isa), kernel_policy("compiled"):
        y = selective_scan(one * 1e-37, delta, A, B, B)
    assert y.isfinite().all() and torch.allclose(y[0, 3], torch.tensor(3.0)) and (y[0, 4:] < 1e-30).all()


PROBE = """
#include "common/exp2.h"
extern "C" __attribute__((visibility("default"))) void probe(const float* x, float* out, int64_t n) {
  using namespace uz::UZ_ISA;
  for_vectors(0, n, [&](int64_t i, auto... left) { store(out + i, uz::UZ_ISA::exp2(load(x + i, left...)), left...); });
}
"""


@every_isa
def test_exp2_is_within_one_and_a_half_ulp(isa: str, tmp_path: Path) -> None:
    sources, library = build.find_sources(), tmp_path / "probe.so"
    (tmp_path / "probe.cpp").write_text(PROBE)
    flags = [*build.CXX_FLAGS, *build.X86_FLAGS[isa], f"-DUZ_ISA={isa}", f"-I{sources}"]
    flags.append(f"-DUZ_ISA_LEVEL={list(build.X86_FLAGS).index(isa)}")
    command = [*shlex.split(build.find_compiler()), *flags, "-shared", str(tmp_path / "probe.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)

    def exp2(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        ctypes.CDLL(str(library)).probe(*map(ctypes.c_void_p, (x.data_ptr(), out.data_ptr())), ctypes.c_int64(len(x)))
        return out

    x = torch.cat(
        [torch.linspace(-124, 127.9, 300_001), torch.linspace(-1, 0, 100_003), -torch.logspace(-30, 0, 9_001)]
    )
    exact = x.double().exp2()
    rounded = exact.float()
    spacing = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    assert float(((exp2(x).double() - exact).abs() / spacing).max()) <= 1.5
    assert (exp2(torch.tensor([-126.5, -150.5, -1e4, -1e30, -3.4e38])) < 2e-37).all()
    assert exp2(torch.tensor([0.0, -0.0, 1.0, -1.0])).tolist() == [1, 1, 2, 0.5]
    assert exp2(torch.tensor([128.5, 1e4, 3e38])).isinf().all() and exp2(torch.tensor([torch.nan])).isnan().all()
