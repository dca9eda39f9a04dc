"""The compiled retention at the edges of its chunks, vectors and documents, in every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_parts import each_isa, hold, random_segments

from ultrazoo.ops import kernel_policy, retention
from ultrazoo.ops.loader import use_cpu_isa
from ultrazoo.spec import Sample

every_isa = each_isa("retention")


def draw(B: int, L: int, H: int, K: int, V: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, n, generator=generator).to(dtype) for n in (K, K, V))
    return [q, k, v, -torch.rand(H, generator=generator)]


def widths(dtype: torch.dtype) -> Iterator[Sample]:
    for K, V in ((1, 1), (3, 17), (4, 5), (7, 64), (16, 15), (33, 2), (65, 48)):
        for causal in (False, True):
            yield Sample(name=f"K{K} V{V}", args=tuple(draw(1, 70, 2, K, V, dtype)), kwargs={"causal": causal})
    yield Sample(name="K0", args=tuple(draw(2, 70, 2, 0, 3, dtype)))
    yield Sample(name="V0", args=tuple(draw(2, 70, 2, 3, 0, dtype)))
    yield Sample(name="H0", args=tuple(draw(2, 70, 0, 3, 4, dtype)))


def chunks(dtype: torch.dtype) -> Iterator[Sample]:
    for L, C in (
        (1, 1),
        (2, 1),
        (5, 2),
        (63, 64),
        (64, 64),
        (65, 64),
        (128, 64),
        (129, 64),
        (40, 3),
        (40, 100),
        (9, 8),
    ):
        for causal in (False, True):
            kwargs = {"causal": causal, "chunk_size": C}
            yield Sample(name=f"L{L} C{C}", args=tuple(draw(1, L, 2, 5, 6, dtype)), kwargs=kwargs)


def documents(dtype: torch.dtype) -> Iterator[Sample]:
    for seed in range(3):
        segments = random_segments(3, 200, seed)
        for C in (None, 16):
            kwargs = {"segments": segments, "causal": seed == 1, "chunk_size": C}
            yield Sample(name=f"documents {seed}", args=tuple(draw(3, 200, 2, 6, 9, dtype, seed)), kwargs=kwargs)


@every_isa
@pytest.mark.parametrize("samples", [widths, chunks, documents], ids=lambda f: f.__name__)
def test_edges(isa: str, samples: object) -> None:
    hold("retention", samples, isa)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_isa
def test_edges_of_half_precision(isa: str, dtype: torch.dtype) -> None:
    hold("retention", documents, isa, dtype)


@every_isa
def test_a_long_row_is_as_exact_as_a_short_one(isa: str) -> None:
    hold("retention", lambda dtype: [Sample(name="L5000", args=tuple(draw(1, 5000, 1, 8, 8, dtype)))], isa)


@every_isa
def test_a_nan_reaches_every_token_that_sees_it_and_no_other_document(isa: str) -> None:
    q, k, v, decay = draw(2, 200, 2, 8, 8, torch.float32)
    segments = random_segments(2, 200, 7)
    k[1, 120, 1, 3] = torch.nan
    document = torch.zeros(2, 200, 2, dtype=torch.bool)
    document[1, :, 1] = segments[1].eq(segments[1, 120])
    later = document & (torch.arange(200)[:, None] >= 120)
    assert segments[1, 120] > 0 and 1 < later.sum() < document.sum() < 200
    with use_cpu_isa(isa), kernel_policy("compiled"):
        both, causal = (
            retention(q, k, v, decay, segments=segments, causal=causal).isnan().any(3) for causal in (False, True)
        )
    assert torch.equal(both, document)
    assert (causal | ~later).all() and (document | ~causal).all()
