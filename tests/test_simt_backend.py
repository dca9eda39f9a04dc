"""The emulator of tests/simt sees each mistake of tests/simt/probe.cu, and runs right kernels rightly in any order."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
import simt_build
import torch
from torch import Tensor

from ultrazoo.ops import build

N = 100  # one block of 64 threads and a part of another
ORDERS = (0, 1, 2)

try:
    simt_build.compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)


class Probe:
    """Calls the kernels of probe.cu on tensors."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.probe.restype = ctypes.c_char_p

    def __call__(self, name: str, x: Tensor, order: int = 0) -> tuple[Tensor, str]:
        self.library.simt_configure(order, ctypes.c_ulonglong(1), 227 * 1024, 90)
        x, out = x.contiguous(), torch.zeros(x.numel() + 64)
        arguments = (name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), x.numel())
        error = self.library.probe(*arguments)
        return out[: x.numel()], "" if error is None else error.decode()

    def convert(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(x.shape, dtype=dtype)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        getattr(self.library, name)(*pointers, ctypes.c_int64(x.numel()))
        return out


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(simt_build.compile_probe("plain", program=False))


def watch(mode: str, name: str, order: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a probe in a program with a sanitizer."""
    if simt_build.runtime_library(mode) is None:
        pytest.skip(f"g++ has no {simt_build.MODES[mode].preload}")
    program = simt_build.compile_probe(mode, program=True)
    environment = {**os.environ, **simt_build.environment(mode)}
    return subprocess.run([program, name, str(order)], env=environment, capture_output=True, text=True)


def numbers() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels_in_any_order(probe: Probe, order: int) -> None:
    x = numbers()
    padded = torch.cat([x, torch.zeros(128 - N)])
    sums, error = probe("block_sum", x, order)
    assert not error
    torch.testing.assert_close(sums, padded.view(2, 64).sum(1).repeat_interleave(64)[:N])
    positive = (padded > 0).view(2, 64).long()
    before = positive.cumsum(1) - positive + 1000 * (padded < 0).view(2, 64).any(1, keepdim=True)
    assert torch.equal(probe("positives_before", x, order)[0], before.flatten()[:N].float())
    assert torch.equal(probe("reverse_warps", x, order)[0], padded.view(4, 32).flip(1).flatten()[:N])


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_follow_cuda(probe: Probe, order: int) -> None:
    padded = torch.arange(128.0) % 10
    padded[N:] = 0
    groups, lane = padded.view(16, 8), torch.arange(8)
    expected = groups[:, 3:4] + 10 * groups[:, torch.where(lane < 2, lane, lane - 2)]
    expected = expected + 100 * groups[:, torch.where(lane + 5 > 7, lane, lane + 5)] + 1000 * groups[:, lane ^ 6]
    assert torch.equal(probe("shuffles", padded[:N], order)[0], expected.flatten()[:N])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("barrier_in_a_branch", "divergent barrier"),
        ("return_before_a_barrier", "barrier"),
        ("barrier_against_shuffle", "barrier"),
        ("write_past_shared", "outside its pieces: 0 bytes past the end of take() number 1"),
        ("misaligned_vector", "misaligned access at"),
        ("past_a_local_array", "index 4 of a local array"),
        ("not_in_its_mask", "0000ffff leaves it out"),
        ("mask_names_the_ended", "barrier|whose thread has ended"),
        ("mask_names_the_absent", "lane 8, which has no thread"),
        ("shuffle_from_outside", "lane 0 reads lane 9, which is not in mask 000000ff"),
        ("different_masks", "mask ffffffff|deadlock"),
        ("different_pieces", "take() number 1"),
        ("large_block", "a block of (1056,1,1) threads"),
        ("tall_grid", "a grid of (2,65536,1) blocks"),
        ("shared_beyond_the_device", "asks for 307200 bytes"),
    ],
)
def test_mistakes_end_the_launch(probe: Probe, name: str, text: str, order: int) -> None:
    error = probe(name, numbers(), order)[1]
    assert any(part in error for part in text.split("|")), error
    assert error.startswith("simt: "), error
    assert probe("block_sum", numbers(), order)[1] == ""  # and the next launch is a fresh one


def test_an_error_says_where(probe: Probe) -> None:
    error = probe("barrier_in_a_branch", numbers())[1]
    assert "barrier_in_a_branch: block (0,0,0) thread (32,0,0): " in error
    assert "probe.cu:" in error


def test_too_little_shared_memory(probe: Probe) -> None:
    assert probe("shared_of", torch.zeros(256))[1] == ""
    assert "takes 1040 bytes, but was launched with 1024" in probe("shared_of", torch.zeros(257))[1]


def test_memory_starts_as_poison(probe: Probe) -> None:
    assert probe("shared_not_initialised", numbers())[0].isnan().all()
    assert (probe("sum_not_initialised", numbers())[0] < -1e38).all()


def test_the_order_shows_a_missing_barrier(probe: Probe) -> None:
    results = [probe("no_barrier", numbers(), order)[0] for order in ORDERS]
    assert all(result.isnan().any() for result in results)
    assert len({tuple(result.isnan().tolist()) for result in results}) == 3


@pytest.mark.parametrize("name", ["read_past_shared", "write_past_shared", "read_past_input", "write_past_output"])
def test_address_sanitizer_sees_one_element_too_far(name: str) -> None:
    result = watch("address", name)
    assert result.returncode == 66, result
    assert "ERROR: AddressSanitizer" in result.stderr
    assert re.search(rf"{name}\b.*probe\.cu:\d+", result.stderr)


@pytest.mark.parametrize("name", ["no_barrier", "same_value_race", "race_between_blocks", "no_syncwarp"])
@pytest.mark.parametrize("order", ORDERS)
def test_thread_sanitizer_sees_races(name: str, order: int) -> None:
    result = watch("thread", name, order)
    assert result.returncode == 66, result
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert re.search(rf"{name}\b.*probe\.cu:\d+", result.stderr)


@pytest.mark.parametrize("mode", ["address", "thread"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["block_sum", "positives_before", "reverse_warps", "shuffles"])
def test_sanitizers_leave_right_kernels_alone(mode: str, order: int, name: str) -> None:
    result = watch(mode, name, order)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_round_to_nearest_even(probe: Probe, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = probe.convert(f"from_{name}", every, torch.float32)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    finite = wide[wide.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).float() / 2
    beside = [torch.nextafter(halfway, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([wide, halfway, *beside, bits.view(torch.float32), torch.tensor([65519.996, 65520.0, 1e-45, 3e38])])
    torch.testing.assert_close(probe.convert(f"to_{name}", x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
