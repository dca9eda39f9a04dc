"""The reference of retention: three forms, chunks of any size, documents, gradients, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo.ops import retention
from ultrazoo.ops.library import kernel_policy
from ultrazoo.ops.retention.op import SPEC
from ultrazoo.ops.retention.reference import retention_parallel, retention_recurrent
from ultrazoo.spec import Sample

CPU = torch.device("cpu")
SAMPLES = list(SPEC.samples(CPU, torch.float64))
BY_NAME = {sample.name: sample for sample in SAMPLES}
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with kernel_policy("reference"):
        yield


def definition(sample: Sample, form: Any = retention_parallel) -> Tensor:
    return form(*sample.args, sample.kwargs.get("segments"), sample.kwargs.get("causal", False))


@every_sample
def test_parallel_chunkwise_and_recurrent_forms_agree(sample: Sample) -> None:
    o = retention(*sample.args, **sample.kwargs)
    torch.testing.assert_close(o, definition(sample), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(o, definition(sample, retention_recurrent), rtol=1e-12, atol=1e-12)


@every_sample
def test_gradients_are_those_of_the_definition(sample: Sample) -> None:
    inputs = [x.clone().requires_grad_() for x in sample.args[:3]]
    graded = Sample(name="", args=(*inputs, sample.args[3]), kwargs=sample.kwargs)
    o = retention(*graded.args, **graded.kwargs)
    grad = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(o, inputs, grad)
    theirs = torch.autograd.grad(definition(graded), inputs, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 2, n, dtype=torch.float64, generator=generator, requires_grad=True) for n in (2, 2, 1))
    log_decay = torch.tensor([-0.03, -0.4], dtype=torch.float64)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 5]])

    def in_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return retention(q, k, v, log_decay, causal=causal, segments=segments, chunk_size=3)

    assert torch.autograd.gradcheck(lambda q, k, v: retention(q, k, v, log_decay, causal=causal), (q, k, v))
    assert torch.autograd.gradcheck(in_documents, (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_chunk_size_changes_nothing(causal: bool) -> None:
    sample = BY_NAME["packed"]
    expected = retention(*sample.args, segments=sample.kwargs["segments"], causal=causal)
    for chunk_size in (1, 5, 32, 64, 200, 1000):
        kwargs = {"segments": sample.kwargs["segments"], "causal": causal, "chunk_size": chunk_size}
        torch.testing.assert_close(retention(*sample.args, **kwargs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_equal_the_documents_apart(causal: bool) -> None:
    sample = BY_NAME["packed"]
    *qkv, log_decay = sample.args
    segments = sample.kwargs["segments"]
    packed = retention(*sample.args, segments=segments, causal=causal)
    assert packed[segments == 0].abs().max() == 0
    for row, number in ((0, 1), (0, 2), (0, 3), (1, 4), (3, 7)):
        here = segments[row] == number
        alone = [x[row : row + 1, here] for x in qkv]
        apart = retention(*[*alone, log_decay], causal=causal)
        torch.testing.assert_close(packed[row, here], apart[0], rtol=1e-12, atol=1e-12)


def test_what_stands_at_padding_reaches_no_token_and_no_gradient() -> None:
    sample = BY_NAME["packed"]
    segments = sample.kwargs["segments"]
    padding = (segments == 0)[:, :, None, None]
    clean = [x.clone().requires_grad_() for x in sample.args[:3]]
    dirty = [x.masked_fill(padding, torch.nan).requires_grad_() for x in sample.args[:3]]
    results = [retention(*[*x, sample.args[3]], segments=segments) for x in (clean, dirty)]
    assert torch.equal(results[0], results[1])
    for o in results:
        o.square().sum().backward()
    for a, b in zip(clean, dirty, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad) and b.grad.masked_select(padding).abs().max() == 0


@pytest.mark.parametrize("name", ["L1", "B0", "strided", "packed causal"])
def test_opcheck(name: str) -> None:
    sample = next(s for s in SPEC.samples(CPU, torch.float32) if s.name == name)
    *qkv, log_decay = sample.args
    options = (sample.kwargs.get("segments"), sample.kwargs.get("causal", False), None)
    inputs = [x.detach().clone().requires_grad_() for x in qkv]
    for op in (torch.ops.ultrazoo.retention.default, torch.ops.ultrazoo.retention.reference):
        torch.library.opcheck(op, (*inputs, log_decay, *options))


def test_compiles_as_one_graph() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Tensor) -> Tensor:
        return retention(q * 2, k, v, log_decay, segments=segments).sin().sum()

    sample = next(s for s in SPEC.samples(CPU, torch.float32) if s.name == "packed")
    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in sample.args[:3]]
        function(*[*inputs, sample.args[3], sample.kwargs["segments"]]).backward()
        gradients.append([x.grad for x in inputs])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["L130", "packed causal"])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    sample = next(s for s in SPEC.samples(CPU, dtype) if s.name == name)
    inputs = [x.requires_grad_() for x in sample.args[:3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = retention(*[*inputs, sample.args[3]], **sample.kwargs)
    exact = retention(*(x.double() for x in sample.args), **sample.kwargs)
    assert o.dtype == dtype
    torch.testing.assert_close(o.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)
    o.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in inputs)


def test_inputs_are_left_alone_and_two_runs_are_equal() -> None:
    sample = BY_NAME["packed"]
    before = [x.clone() for x in sample.args]
    runs = [retention(*sample.args, **sample.kwargs) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(torch.equal(a, b) for a, b in zip(before, sample.args, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"k": torch.zeros(2, 5, 3, 5)},
            ValueError,
            r"k: got shape \(2, 5, 3, 5\), expected \(B, L, H, K\) with B 2, L 5, H 3, K 4",
        ),
        (
            {"v": torch.zeros(2, 5, 2, 4)},
            ValueError,
            r"v: got shape \(2, 5, 2, 4\), expected \(B, L, H, V\) with B 2, L 5, H 3",
        ),
        ({"log_decay": torch.zeros(1)}, ValueError, r"log_decay: got shape \(1,\), expected \(H\) with H 3"),
        ({"log_decay": torch.zeros(3, requires_grad=True)}, ValueError, "detach it"),
        ({"segments": torch.ones(5, 2).long()}, ValueError, r"segments: got shape \(5, 2\)"),
        ({"segments": torch.ones(2, 5)}, TypeError, "expected integers"),
        ({"q": torch.zeros(2, 5, 3, 4, dtype=torch.int32)}, TypeError, "floating-point"),
        ({"chunk_size": 0}, ValueError, "at least 1"),
        ({"v": torch.zeros(2, 5, 3, 4, device="meta")}, ValueError, "v: got meta, expected cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {name: torch.zeros(2, 5, 3, 4) for name in "qkv"} | {"log_decay": torch.zeros(3)}
    with pytest.raises(error, match=message):
        retention(**(good | change))


def test_no_second_derivative() -> None:
    q, k, v = (torch.randn(1, 3, 1, 2, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(retention(q, k, v, torch.zeros(1)).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


def test_cost_counts_matrix_products() -> None:
    sample = next(s for s in SPEC.bench_samples(CPU, torch.float32) if s.name == "B4 H8 K64 V128 L1024")
    pairs, states = (
        1024 * 2 * 64 * (64 + 128),
        (1024 - 64) * 8 * 64 * 128,
    )
    assert SPEC.cost(sample).flops == 4 * 8 * (pairs + states)
