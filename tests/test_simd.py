"""The vector wrappers of csrc/common/simd.h, compiled for every instruction set that this CPU runs."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ultrazoo.ops import build, loader

LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}
NEEDS = {"portable": set(), "avx2": {"avx2", "avx512", "avx512vnni"}, "avx512": {"avx512", "avx512vnni"}}


class Probe:
    """Calls the functions of simd_probe.cpp on tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.lanes = int(self._library.probe_lanes())

    def __call__(self, name: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        x = x.contiguous()
        out = torch.empty(x.shape, dtype=dtype)
        function = getattr(self._library, f"probe_{name}")
        function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel()))
        return out


@pytest.fixture(scope="module", params=list(LEVELS))
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    isa = request.param
    if isa != "portable" and loader.cpu_isa() not in NEEDS[isa]:
        pytest.skip(f"this CPU has no {isa}, or there are no kernels at all")
    try:
        compiler = shlex.split(build.find_compiler())
    except build.BuildError as error:
        pytest.skip(error.reason)
    sources, out = build.find_sources(), tmp_path_factory.mktemp("simd") / "probe.so"
    assert sources is not None
    flags = [
        *build.CXX_FLAGS,
        *build.X86_FLAGS[isa],
        f"-DUZ_ISA={isa}",
        f"-DUZ_ISA_LEVEL={LEVELS[isa]}",
        f"-I{sources}",
    ]
    source = Path(__file__).with_name("simd_probe.cpp")
    subprocess.run([*compiler, *flags, "-shared", str(source), "-o", str(out)], check=True)
    return Probe(out)


def ulps(got: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place of the exact result rounded to fp32."""
    rounded = exact.float()
    spacing = torch.nextafter(rounded.abs(), torch.tensor(torch.inf)).double() - rounded.abs().double()
    return float(((got.double() - exact).abs() / spacing).max())


def test_exp_is_within_one_ulp_down_to_the_subnormals(probe: Probe) -> None:
    x = torch.cat([torch.linspace(-103.5, 88.7, 200_003), torch.linspace(-1e-3, 1e-3, 5_001)])
    assert ulps(probe("exp", x), x.double().exp()) <= 1.0


def test_exp_at_the_edges(probe: Probe) -> None:
    x = torch.tensor([-torch.inf, -1e30, -200.0, 0.0, -0.0, 88.8, 1e30, torch.inf, torch.nan])
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, torch.inf, torch.inf, torch.inf, torch.nan])
    torch.testing.assert_close(probe("exp", x), expected, rtol=0, atol=0, equal_nan=True)


def test_log1p_sigmoid_and_softplus(probe: Probe) -> None:
    unit = torch.cat([torch.linspace(0, 1, 100_003), torch.logspace(-38, 0, 5_001)])
    assert ulps(probe("log1p", unit), unit.double().log1p()) <= 1.5
    x = torch.linspace(-80, 80, 100_003)
    assert ulps(probe("sigmoid", x), x.double().sigmoid()) <= 2.5
    assert ulps(probe("softplus", x), torch.logaddexp(x.double(), torch.zeros(1).double())) <= 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_widens_exactly(probe: Probe, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    got = probe(f"from_{str(dtype).removeprefix('torch.')}", every)
    torch.testing.assert_close(got, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(probe: Probe, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).float() / 2  # ties, and a little to both sides of each
    up, down = (torch.nextafter(halfway, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-45, 65519.996, 65520.0])
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([every, halfway, up, down, special, bits.view(torch.float32)])
    got = probe(f"to_{str(dtype).removeprefix('torch.')}", x, dtype)
    torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_tails_of_every_length(probe: Probe) -> None:
    for n in range(2 * probe.lanes + 1):
        x = torch.linspace(-2, 2, n) if n else torch.empty(0)
        guarded = torch.full((n + 40,), 7.0)
        guarded[:n] = probe("min_max", x)
        assert torch.equal(guarded[:n], x.clamp(-1, 1))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(probe(f"to_{str(dtype).removeprefix('torch.')}", x, dtype), x.to(dtype))


def test_rounding_selection_and_reductions(probe: Probe) -> None:
    x = torch.arange(-64, 64) / 4
    assert torch.equal(probe("round", x), x.round())
    assert torch.equal(probe("select", x), torch.where(x > 0.5, -x, x.abs()))
    groups = torch.randn(8, probe.lanes, generator=torch.Generator().manual_seed(0))
    sums = probe("reduce_add", groups)[:, 0]
    torch.testing.assert_close(sums, groups.sum(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(probe("reduce_max", groups)[:, 0], groups.max(1).values)
