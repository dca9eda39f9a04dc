"""What the samples of an op must cover, and the laws of documents on calls made from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from ultrazoo.registry import registry
from ultrazoo.spec import Cost, OpSpec, Sample
from ultrazoo.testing.op_laws import OP_LAWS, documents, hold_reference
from ultrazoo.testing.sample_rules import missing

CPU = torch.device("cpu")
PACKED = torch.tensor([[0, 1, 1, 1, 2, 2, 0], [3] * 7, [4, 4, 0, 5, 5, 5, 5]])


def total(
    x: Tensor,
    *,
    segments: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    kind: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """The sum or mean over the document."""
    ids = torch.ones(x.shape[:2], dtype=torch.int64) if segments is None else segments
    same = (ids[:, :, None] == ids[:, None]) & ids.ne(0)[:, None]
    weights = (same.tril() if causal else same).to(x.dtype)
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1) if kind == "mean" else weights
    y = weights @ torch.where(ids.eq(0)[:, :, None], 0, x)
    return (y if bias is None else y + bias) * ids.ne(0)[:, :, None]


def call(rows: int, length: int, width: int = 19, **kwargs: object) -> Sample:
    draw = torch.Generator().manual_seed(0)
    return Sample(name="", args=(torch.randn(rows, length, width, generator=draw),), kwargs=kwargs)


FULL = {
    "L0": call(2, 0),
    "L1": call(2, 1),
    "B0": call(0, 5),
    "rows": call(3, 7, causal=True),
    "packed": call(3, 7, segments=PACKED, bias=torch.ones(19), kind="mean"),
}


def spec(samples: Iterable[Sample]) -> OpSpec:
    return OpSpec(
        name="test::total",
        op=total,
        reference=total,
        samples=lambda device, dtype: samples,
        bench_samples=lambda device, dtype: samples,
        cost=lambda sample: Cost(flops=1, bytes=1),
    )


def lacks(*samples: Sample) -> str:
    return "; ".join(missing(spec(samples), samples))


def test_full_samples_lack_nothing() -> None:
    assert lacks(*FULL.values()) == ""


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("L0", "length 0 (x of shape (2, 0, ...))"),
        ("L1", "length 1 (x of shape (2, 1, ...))"),
        ("B0", "batch 0 (x of shape (0, 5, ...))"),
        ("rows", "causal=True in a call with tokens"),
    ],
)
def test_a_missing_case_is_named_alone(without: str, told: str) -> None:
    assert lacks(*(sample for name, sample in FULL.items() if name != without)) == told


def with_segments(segments: Tensor, width: int = 19, **kwargs: object) -> str:
    others = [sample for name, sample in FULL.items() if name != "packed"]
    return lacks(*others, call(*segments.shape, width, segments=segments, bias=torch.ones(width), **kwargs))


def test_segments_must_be_packed_padded_and_different() -> None:
    assert "packed rows" in with_segments(PACKED.clamp(max=1), kind="mean")
    assert "padded rows" in with_segments(PACKED.clamp(min=1), kind="mean")
    assert "different documents" in with_segments(PACKED[:1].expand(3, 7), kind="mean")
    assert "padded rows" not in with_segments(PACKED, kind="mean")
    # documents of one token each show no leak within a document and no wrong direction
    assert "packed rows" in with_segments(torch.tensor([[1, 2, 3, 0], [4, 5, 0, 6]]), kind="mean")


def test_options_and_widths_must_be_there_in_calls_with_tokens() -> None:
    told = lacks(call(2, 0, 16, causal=True), call(2, 1, 16), call(0, 5, 16), call(3, 7, 16, segments=PACKED))
    for case in ("causal=True", "bias given", "kind='mean'", "a width of x beyond one vector"):
        assert case in told
    assert "causal=False" not in told and "kind='sum'" not in told


def scale(x: Tensor, factor: float) -> Tensor:
    return factor * x


def test_an_op_without_a_length_has_tokens() -> None:
    elementwise = replace(spec(()), op=scale)
    shapes = [(), (5,), (3, 19), (0, 4)]
    full = [Sample(name="", args=(torch.ones(shape), 2.0)) for shape in shapes]
    assert missing(elementwise, full) == []
    assert missing(elementwise, full[2:]) == ["one token (x of shape (1, 5))"]
    assert missing(elementwise, full[:3]) == ["no token (x of shape (0, 5))"]
    assert missing(elementwise, []) == ["any sample"]


@pytest.mark.parametrize("name", sorted(registry().ops()))
def test_the_built_in_samples_suffice(name: str) -> None:
    op = registry().op(name)
    assert missing(op, list(op.samples(CPU, torch.float32))) == []


def leaks(x: Tensor, **options: object) -> Tensor:
    segments = options.pop("segments", None)
    return total(x, segments=None if segments is None else segments.clamp(max=1), **options)  # type: ignore[attr-defined, arg-type]


def reads_padding(x: Tensor, **options: object) -> Tensor:
    y = total(x, **options)  # type: ignore[arg-type]
    return y + 1e-6 * x.roll(1, 1)


def mixes_rows(x: Tensor, **options: object) -> Tensor:
    return total(x, **options) + 1e-6 * x[:1].sum()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "broken"),
    [
        (total, set()),
        (leaks, {"packing"}),
        (reads_padding, {"packing", "padding"}),
        (mixes_rows, {"packing", "padding", "batch order"}),
    ],
)
def test_a_reference_that_breaks_a_law_of_documents_is_caught_without_packed_samples(
    reference: object, broken: set[str]
) -> None:
    thin = replace(spec([call(3, 7, causal=True), call(3, 7)]), reference=reference)  # type: ignore[arg-type]
    assert {name for name in OP_LAWS if hold_reference(name, thin).excess > 1} == broken


def test_the_documents_of_the_laws_have_padding_at_every_place() -> None:
    segments = documents(3, 40)
    assert (segments[:, 0] == 0).any() and (segments[:, -1] == 0).any()
    inner = segments[0, 1:-1]
    assert (inner == 0).any() and len(segments.unique()) > 8
    assert not torch.equal(segments[0], segments[1])
