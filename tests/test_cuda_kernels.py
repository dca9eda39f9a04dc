"""The CUDA kernels, executed thread by thread under the emulator of tests/simt and held to the references."""

from __future__ import annotations

import functools

import pytest
import simt_build
import simt_run
import torch

from ultrazoo.ops import build
from ultrazoo.ops.library import kernel_policy
from ultrazoo.testing import op_checks
from ultrazoo.testing.parity import Cases

try:
    simt_build.compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)

DTYPES = ("float32", "bfloat16", "float16")
MACROS = ("UZ_SIMT_MMA",)


def runs() -> list[tuple[str, str, str, int]]:
    """List the ops by the order of the threads, and once more those with a path that a macro chooses."""
    sources, found = build.find_sources(), list[tuple[str, str, str, int]]()
    for folder in simt_build.folders():
        assert sources is not None
        text = "".join(path.read_text() for path in (sources / folder).glob("*.cu*"))
        found += [(folder, "", "descending", 61), (folder, "", "random", 90)]
        found += [(folder, macro, "random", 90) for macro in MACROS if macro in text]
    return found


@functools.cache
def emulated(folder: str, define: str) -> simt_run.Emulated:
    return simt_run.Emulated(folder, simt_build.compile_op(folder, define=define), simt_build.prefix(define))


@functools.cache
def cases(folder: str, number: int, dtype: torch.dtype, more: bool) -> Cases:
    return simt_run.cases_of(emulated(folder, "").specs[number], dtype, more=more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folder", simt_build.folders())
def test_parity(folder: str, dtype: str) -> None:
    kernels, kind = emulated(folder, ""), getattr(torch, dtype)
    kernels.configure("ascending")
    for number, spec in enumerate(kernels.specs):
        shared = cases(folder, number, kind, more=False)
        row = simt_run.parity(spec, kind, "ascending", shared, opcheck=False)
        assert row.checks >= 5
        assert not row.failures, row


@pytest.mark.parametrize("folder", simt_build.folders())
def test_registration(folder: str) -> None:
    kernels = emulated(folder, "")
    kernels.configure("ascending")
    with kernel_policy("compiled"):
        for number, spec in enumerate(kernels.specs):
            samples = cases(folder, number, torch.float32, more=False).samples
            outcome = op_checks.registration(spec, samples[1::5])
            assert outcome.ok, outcome.detail


@pytest.mark.parametrize(("folder", "define", "order", "capability"), runs())
def test_other_orders_of_the_threads(folder: str, define: str, order: str, capability: int) -> None:
    kernels = emulated(folder, define)
    kernels.configure(order, capability=capability)
    for number, spec in enumerate(kernels.specs):
        row = simt_run.each_sample(spec, torch.float32, order, cases(folder, number, torch.float32, more=True))
        assert row.checks > 0
        assert not row.failures, row
