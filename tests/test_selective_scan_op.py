"""The reference of the selective scan: chunked against the loop, documents, directions, gradients, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo.ops import selective_scan
from ultrazoo.ops.library import kernel_policy
from ultrazoo.ops.selective_scan import op as scan_op
from ultrazoo.ops.selective_scan import reference
from ultrazoo.ops.selective_scan.op import SPEC
from ultrazoo.ops.selective_scan.reference import selective_scan_loop
from ultrazoo.spec import Sample

CPU = torch.device("cpu")
SAMPLES = list(SPEC.samples(CPU, torch.float64))
BY_NAME = {sample.name: sample for sample in SAMPLES}
TENSORS = ("z", "delta_bias")


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with kernel_policy("reference"):
        yield


def sample_of(name: str, dtype: torch.dtype) -> Sample:
    return next(sample for sample in SPEC.samples(CPU, dtype) if sample.name == name)


def with_gradients(sample: Sample) -> tuple[Sample, list[Tensor]]:
    args = [x.detach().clone().requires_grad_() for x in sample.args]
    more = {k: sample.kwargs[k].detach().clone().requires_grad_() for k in TENSORS if k in sample.kwargs}
    return Sample(name="", args=tuple(args), kwargs={**sample.kwargs, **more}), [*args, *more.values()]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_output_and_gradients_are_those_of_the_loop(sample: Sample) -> None:
    graded, inputs = with_gradients(sample)
    y = selective_scan(*graded.args, **graded.kwargs)
    expected = selective_scan_loop(*graded.args, **graded.kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(y, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad, materialize_grads=True)  # of an empty row: zeros
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3), (2, 5, 3), (3, 2), (2, 5, 2), (2, 5, 2), (3,), (2, 5, 3), (3,))
    u, delta, A, B, C, D, z, bias = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    inputs = [x.requires_grad_() for x in (u, delta, -A.abs() - 0.1, B, C, D, z, bias)]
    segments = torch.tensor([[1, 1, 2, 2, 0], [0, 3, 3, 3, 5]])

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"delta_softplus": True, "segments": segments, "reverse": reverse}
        return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, **options)

    assert torch.autograd.gradcheck(scan, inputs)


@pytest.mark.parametrize("name", ["L130", "packed reverse"])
def test_chunks_and_row_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graded, inputs = with_gradients(BY_NAME[name])

    def run() -> list[Tensor]:
        y = selective_scan(*graded.args, **graded.kwargs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    expected = run()
    for chunk, numbers in ((1, 1), (7, 40), (1000, 1 << 20)):
        for module in (reference, scan_op):
            monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(reference, "_NUMBERS_AT_ONCE", numbers)
        for a, b in zip(run(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_equal_the_documents_apart(reverse: bool) -> None:
    sample = BY_NAME["packed"]
    u, delta, A, B, C, D = sample.args
    segments, z, bias = (sample.kwargs[k] for k in ("segments", "z", "delta_bias"))
    options: dict[str, Any] = {"delta_bias": bias, "delta_softplus": True, "reverse": reverse}
    packed = selective_scan(*sample.args, z=z, segments=segments, **options)
    assert packed[segments == 0].abs().max() == 0
    for row, number in ((0, 1), (0, 2), (0, 3), (1, 4), (3, 1), (3, 7), (3, 2)):
        here = segments[row] == number
        at = [x[row : row + 1, here] for x in (u, delta, B, C, z)]
        apart = selective_scan(at[0], at[1], A, at[2], at[3], D, z=at[4], **options)
        torch.testing.assert_close(packed[row, here], apart[0], rtol=1e-12, atol=1e-12)


def test_reverse_is_the_scan_of_the_reversed_row() -> None:
    sample = BY_NAME["L130"]
    u, delta, A, B, C, D = sample.args
    options = {**sample.kwargs, "z": sample.kwargs["z"].flip(1), "reverse": True}
    mirrored = selective_scan(u.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D, **options)
    expected = selective_scan(*sample.args, **{**sample.kwargs, "reverse": False})
    torch.testing.assert_close(mirrored.flip(1), expected, rtol=1e-12, atol=1e-12)


def test_what_stands_at_padding_reaches_no_token_and_no_gradient() -> None:
    sample = BY_NAME["packed"]
    padding = (sample.kwargs["segments"] == 0).unsqueeze(2)
    dirty_args = [x.masked_fill(padding, torch.nan) if x.dim() == 3 else x for x in sample.args]
    dirty_kwargs = {**sample.kwargs, "z": sample.kwargs["z"].masked_fill(padding, torch.inf)}
    results = []
    for graded, inputs in map(with_gradients, (sample, Sample(name="", args=tuple(dirty_args), kwargs=dirty_kwargs))):
        y = selective_scan(*graded.args, **graded.kwargs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["L63", "B0", "strided", "packed reverse"])
def test_opcheck(name: str) -> None:
    graded, _ = with_gradients(sample_of(name, torch.float32))
    k = graded.kwargs
    D = graded.args[5] if len(graded.args) > 5 else None
    softplus, reverse = k.get("delta_softplus", False), k.get("reverse", False)
    args = (*graded.args[:5], D, k.get("z"), k.get("delta_bias"), softplus, k.get("segments"), reverse)
    for op in (torch.ops.ultrazoo.selective_scan.default, torch.ops.ultrazoo.selective_scan.reference):
        torch.library.opcheck(op, args)


def test_compiles_as_one_graph() -> None:
    def loss(graded: Sample) -> Tensor:
        return selective_scan(graded.args[0] * 2, *graded.args[1:], **graded.kwargs).sin().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        graded, inputs = with_gradients(sample_of("packed reverse", torch.float32))
        results.append(torch.autograd.grad(function(graded), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["L130", "packed reverse", "large steps"])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    graded, inputs = with_gradients(sample_of(name, dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(*graded.args, **graded.kwargs)
    exact_kwargs = {k: v.double() if k in TENSORS else v for k, v in graded.kwargs.items()}
    exact = selective_scan(*(x.double() for x in graded.args), **exact_kwargs)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)
    gradients = torch.autograd.grad(y.sum(), inputs)
    assert all(g.dtype == x.dtype and g.isfinite().all() for g, x in zip(gradients, inputs, strict=True))


def test_inputs_are_left_alone_and_two_runs_are_equal() -> None:
    graded, inputs = with_gradients(BY_NAME["packed"])
    before = [x.clone() for x in inputs]
    runs = [selective_scan(*graded.args, **graded.kwargs) for _ in range(2)]
    gradients = [torch.autograd.grad(y.sum(), inputs) for y in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2, 5)}, ValueError, r"u: got shape \(2, 5\), expected \(batch, length, dim\)"),
        ({"A": torch.zeros(3, 4)}, ValueError, r"A: got shape \(3, 4\), expected \(dim, state\) with dim 4"),
        ({"delta": torch.zeros(2, 4, 5)}, ValueError, r"delta: got shape \(2, 4, 5\), .* length 5, dim 4"),
        ({"B": torch.zeros(2, 3, 5)}, ValueError, r"B: got shape \(2, 3, 5\), .* length 5, state 3"),
        ({"D": torch.zeros(3)}, ValueError, r"D: got shape \(3,\), expected \(dim\) with dim 4"),
        ({"segments": torch.ones(2, 5)}, TypeError, "expected integers"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "floating-point dtype"),
        ({"z": torch.zeros(2, 5, 4, device="meta")}, ValueError, "z: got meta, expected cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"u": torch.zeros(2, 5, 4), "delta": torch.zeros(2, 5, 4), "A": torch.zeros(4, 3)}
    good |= {"B": torch.zeros(2, 5, 3), "C": torch.zeros(2, 5, 3)}
    with pytest.raises(error, match=message):
        selective_scan(**(good | change))
