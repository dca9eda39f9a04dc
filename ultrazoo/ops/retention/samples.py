"""Sample calls of retention, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultrazoo.ops.retention.reference import DEFAULT_CHUNK
from ultrazoo.spec import Cost, Sample


class _Draw:
    """Random arguments for samples, always the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def tensors(self, B: int, L: int, H: int, K: int, V: int) -> tuple[Tensor, ...]:
        shapes = ((B, L, H, K), (B, L, H, K), (B, L, H, V))
        q, k, v = (torch.randn(shape, generator=self.generator).to(self.device, self.dtype) for shape in shapes)
        return q, k * K**-0.5, v, self.log_decay(H)

    def log_decay(self, H: int) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.log1p(-(2.0 ** (-5 - torch.arange(H, dtype=torch.float64)))).to(self.device, wide)

    def segments(self, rows: list[list[tuple[int, int]]]) -> Tensor:
        """(B, L) from (number, length) pairs."""
        return torch.tensor([[n for n, length in row for _ in range(length)] for row in rows], device=self.device)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Small and nasty calls."""
    draw = _Draw(device, dtype)
    for L in (1, 63, 64, 130):
        yield Sample(name=f"L{L}", args=draw.tensors(2, L, 3, 8, 16))
        yield Sample(name=f"L{L} causal", args=draw.tensors(1, L, 2, 16, 8), kwargs={"causal": True})
    yield Sample(name="B0", args=draw.tensors(0, 5, 2, 4, 4))
    yield Sample(name="L0", args=draw.tensors(2, 0, 2, 4, 4))
    yield Sample(name="odd sizes, C7", args=draw.tensors(3, 33, 5, 7, 3), kwargs={"chunk_size": 7})
    yield Sample(name="wider than a vector", args=draw.tensors(1, 37, 1, 19, 35))
    yield Sample(name="C1 causal", args=draw.tensors(1, 9, 2, 4, 4), kwargs={"chunk_size": 1, "causal": True})

    fused = torch.randn(2, 3, 70, 3 * 8, generator=draw.generator).to(device, dtype)  # (B, H, L, q k v)
    q, k, v = (x.transpose(1, 2) for x in fused.split(8, dim=3))
    yield Sample(name="strided", args=(q, k, v, draw.log_decay(3)))
    one = torch.randn(1, 1, 2, 8, generator=draw.generator).to(device, dtype)
    yield Sample(name="expanded", args=(*(one.expand(2, 66, 2, 8),) * 3, draw.log_decay(2)))

    many = draw.segments([[(1, 5), (2, 11 + row), (0, 24 - row)] for row in range(8)])  # 144 walks, not cut up
    kwargs = {"chunk_size": 8, "segments": many}
    yield Sample(name="many heads, C8", args=draw.tensors(8, 40, 9, 4, 4), kwargs=kwargs)

    q, k, v, _ = draw.tensors(2, 70, 3, 8, 8)
    decays = torch.tensor([0.0, -0.5, -60.0], device=device, dtype=torch.promote_types(dtype, torch.float32))
    yield Sample(name="no decay to total decay", args=(q, k, v, decays))

    packed = draw.segments(
        [[(0, 3), (1, 61), (2, 64), (3, 1), (0, 71)], [(4, 200)], [(0, 200)], [(1, 64), (7, 130), (2, 5), (0, 1)]]
    )
    for causal in (False, True):
        kwargs = {"segments": packed, "causal": causal}
        yield Sample(name=f"packed{' causal' * causal}", args=draw.tensors(4, 200, 2, 8, 8), kwargs=kwargs)
    gaps = draw.segments([[(0, 2), (5, 31), (0, 1), (5, 20), (0, 7), (5, 4), (3, 4), (0, 1)], [(1, 1), (0, 1)] * 35])
    for causal in (False, True):
        kwargs = {"segments": gaps, "causal": causal}
        yield Sample(name=f"gaps{' causal' * causal}", args=draw.tensors(2, 70, 1, 8, 8), kwargs=kwargs)
    padded = draw.segments([[(1, 20), (0, 13)], [(1, 33)]])
    yield Sample(name="padded, C8", args=draw.tensors(2, 33, 2, 4, 8), kwargs={"segments": padded, "chunk_size": 8})


def bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of realistic size."""
    draw = _Draw(device, dtype)
    for L in (128, 256, 512, 1024, 2048, 4096):
        for V in (64, 128):
            yield Sample(name=f"B4 H8 K64 V{V} L{L}", args=draw.tensors(4, L, 8, 64, V))
    yield Sample(name="B4 H8 K64 V64 L1024 causal", args=draw.tensors(4, 1024, 8, 64, 64), kwargs={"causal": True})
    segments = draw.segments([[(1, 300), (2, 500), (3, 150), (0, 74)]] * 4)
    kwargs = {"segments": segments}
    yield Sample(name="B4 H8 K64 V64 L1024 packed", args=draw.tensors(4, 1024, 8, 64, 64), kwargs=kwargs)


def cost(sample: Sample) -> Cost:
    """The chunkwise form's matrix products at C = 64 (their lower triangles when causal), or the parallel form's."""
    q, k, v, _ = sample.args
    B, L, H, K = q.shape
    V = v.shape[3]
    causal = bool(sample.kwargs.get("causal", False))
    pairs = min(L, DEFAULT_CHUNK) * (0.5 if causal else 1.0)
    chunks = max(1, -(-L // DEFAULT_CHUNK))
    states = (1 if causal else 2) * (chunks - 1) / chunks  # nothing enters the first chunk or leaves the last one
    flops = B * L * H * (2 * pairs * (K + V) + 4 * states * K * V)
    return Cost(flops=flops, bytes=sum(x.numel() * x.element_size() for x in (q, k, v, v)))
