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


def runs() -> list[tuple[str, str, str, int, str]]:
    """List the ops by the order of the threads, and once more those with a path that a macro chooses."""
    sources, found = build.find_sources(), list[tuple[str, str, str, int, str]]()
    for folder in simt_build.folders():
        assert sources is not None
        text = "".join(path.read_text() for path in (sources / folder).glob("*.cu*"))
        found += [(folder, "", "descending", 61, "float32"), (folder, "", "random", 90, "float32")]
        macros = [macro for macro in MACROS if macro in text]
        found += [(folder, macro, "random", 90, "bfloat16") for macro in macros]
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


@pytest.mark.parametrize(("folder", "define", "order", "capability", "dtype"), runs())
def test_other_orders_of_the_threads(folder: str, define: str, order: str, capability: int, dtype: str) -> None:
    kernels, kind = emulated(folder, define), getattr(torch, dtype)
    kernels.configure(order, capability=capability)
    for number, spec in enumerate(kernels.specs):
        row = simt_run.each_sample(spec, kind, order, cases(folder, number, kind, more=True))
        assert row.checks > 0
        assert not row.failures, row


def test_retention_by_tensor_cores() -> None:
    """It is another path than the plain one, and keeps documents apart, whatever is in them."""
    plain, mma = (emulated("retention", define) for define in ("", *MACROS))
    x = torch.randn(1, 80, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    segments, log_decay = torch.tensor([[1] * 30 + [2] * 50]), torch.tensor([-0.1])
    spoilt = x.clone()
    spoilt[:, :30] = torch.tensor([torch.nan, torch.inf]).repeat(15)[:, None, None]
    outputs = []
    with kernel_policy("compiled"):
        for kernels in (plain, mma):
            kernels.configure("ascending")
            op = kernels.specs[0].op
            clean, other = (op(each, each, each, log_decay, segments=segments) for each in (x, spoilt))
            assert torch.equal(clean[:, 30:], other[:, 30:])
            outputs.append(clean)
    assert not torch.equal(*outputs)
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)


def test_retention_keeps_states_beyond_65504() -> None:
    """In fp16 the states of the tensor-core path may be larger than any fp16 number, as would be the gradient of q."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 140, 1, 8, generator=draw) for _ in "qkv")
    half, log_decay = [x.half() for x in (q / 4096, k * 256, v * 256)], torch.tensor([-0.01])
    states = half[1][0, :, 0].double().mT @ half[2][0, :, 0].double()
    assert states.abs().max() > 2 * 65504
    kernels = emulated("retention", *MACROS)
    kernels.configure("random")
    with kernel_policy("compiled"), torch.no_grad():
        found = kernels.specs[0].op(*half, log_decay)
    truth = kernels.specs[0].reference(*(x.double() for x in half), log_decay)
    torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=1e-3 * truth.abs().max().item())


@pytest.mark.parametrize("folder", ["retention", "selective_scan"])
@pytest.mark.parametrize("row", [[1, 2, 1, 2], [3, 0, 1, 3], [1, -1, 1, 1]])
def test_a_document_that_returns_fails_an_assertion_on_the_device(folder: str, row: list[int]) -> None:
    kernels = emulated(folder, "")
    kernels.configure("ascending")
    x = torch.ones(2, 4, 1, 8)
    segments = torch.tensor([[1, 1, 0, 1], row])
    given = (
        (x, x, x, torch.tensor([-0.1])) if folder == "retention" else (x[:, :, 0], x[:, :, 0], -x[0, 0].expand(8, 8))
    )
    more = () if folder == "retention" else (x[:, :, 0], x[:, :, 0])
    op = kernels.specs[0].op
    with kernel_policy("compiled"):
        op(*given, *more, segments=segments[:1].expand(2, -1))
        with pytest.raises(RuntimeError, match=r"check_documents_kernel: block \(1,0,0\).*one run of tokens"):
            op(*given, *more, segments=segments)
