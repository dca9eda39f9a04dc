"""Sample calls of gated linear attention, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.spec import Cost, Sample
from ultrazoo_gla.reference import CHUNK


class _Draw:
    """Random arguments for samples, always the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def tensors(self, B: int, L: int, H: int, K: int, V: int, temperature: float = 16) -> tuple[Tensor, ...]:
        q, k, v = (self.normal(B, L, H, width).to(self.device, self.dtype) for width in (K, K, V))
        return q * K**-0.5, k, v, self.gate(B, L, H, K, temperature=temperature)

    def gate(self, *shape: int, temperature: float = 16) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return (F.logsigmoid(self.normal(*shape)) / temperature).to(self.device, wide)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def segments(self, rows: list[list[tuple[int, int]]]) -> Tensor:
        """(B, L) from (number, length) pairs."""
        return torch.tensor([[n for n, length in row for _ in range(length)] for row in rows], device=self.device)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Small and nasty calls."""
    draw = _Draw(device, dtype)
    for L in (1, 2, 15, 16, 17, 50):
        yield Sample(name=f"L{L}", args=draw.tensors(2, L, 2, 8, 16))
    for L in (1, 33):
        yield Sample(name=f"L{L} causal", args=draw.tensors(1, L, 2, 16, 8), kwargs={"causal": True})
    yield Sample(name="B0", args=draw.tensors(0, 5, 2, 4, 4))
    yield Sample(name="L0", args=draw.tensors(2, 0, 2, 4, 4))
    yield Sample(name="odd sizes", args=draw.tensors(3, 35, 3, 7, 5))
    yield Sample(name="wider than a register", args=draw.tensors(1, 37, 1, 33, 71))

    q, k, v, _ = draw.tensors(2, 40, 3, 8, 8)
    both = draw.gate(2, 40, 2, 3, 8, temperature=2)
    yield Sample(name="a gate for each direction", args=(q, k, v, both))
    fused = draw.normal(2, 3, 40, 3 * 8).to(device, dtype)  # (B, H, L, q k v)
    strided = (x.transpose(1, 2) for x in fused.split(8, dim=3))
    yield Sample(name="strided", args=(*strided, draw.gate(2, 40, 3, 8)))
    one, gate = draw.normal(1, 1, 2, 8).to(device, dtype), draw.gate(1, 1, 2, 8)
    yield Sample(name="expanded", args=(*(one.expand(2, 34, 2, 8),) * 3, gate.expand(2, 34, 2, 8)))

    q, k, v, gate = draw.tensors(2, 60, 4, 8, 8)
    scales = torch.tensor([0.0, 1.0, 200.0, 4000.0], device=device, dtype=gate.dtype)[:, None]
    yield Sample(name="open gates to shut ones", args=(q, k, v, gate * scales))

    rows = [[(0, 3), (1, 21), (2, 16), (3, 1), (0, 9)], [(4, 50)], [(0, 50)], [(1, 16), (7, 30), (2, 3), (0, 1)]]
    packed = draw.segments(rows)
    for causal in (False, True):
        kwargs = {"segments": packed, "causal": causal}
        yield Sample(
            name=f"packed{' causal' * causal}", args=draw.tensors(4, 50, 2, 8, 8, temperature=1), kwargs=kwargs
        )
    gaps = draw.segments([[(0, 2), (2, 14), (0, 1), (2, 20), (0, 3)], [(1, 1), (0, 1)] * 20])
    for causal in (False, True):
        kwargs = {"segments": gaps, "causal": causal}
        yield Sample(name=f"gaps{' causal' * causal}", args=draw.tensors(2, 40, 2, 5, 8, temperature=1), kwargs=kwargs)
    padded = draw.segments([[(1, 20), (0, 5)], [(1, 25)]])
    args = (*draw.tensors(2, 25, 2, 4, 8)[:3], draw.gate(2, 25, 2, 2, 4))
    yield Sample(name="padded", args=args, kwargs={"segments": padded})


def bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of realistic size."""
    draw = _Draw(device, dtype)
    for L in (128, 512, 2048):
        for K, V in ((32, 64), (64, 128)):
            yield Sample(name=f"B4 H8 K{K} V{V} L{L}", args=draw.tensors(4, L, 8, K, V))
    yield Sample(name="B4 H8 K32 V64 L512 causal", args=draw.tensors(4, 512, 8, 32, 64), kwargs={"causal": True})
    segments = draw.segments([[(1, 150), (2, 250), (3, 80), (0, 32)]] * 4)
    yield Sample(name="B4 H8 K32 V64 L512 packed", args=draw.tensors(4, 512, 8, 32, 64), kwargs={"segments": segments})


def cost(sample: Sample) -> Cost:
    """The chunkwise form: the states' products, and the pairs within a chunk with a weight for each channel."""
    q, k, v, gate = sample.args
    B, L, H, K = q.shape
    V = v.shape[3]
    directions = 1 if sample.kwargs.get("causal", False) else 2
    chunks = max(1, -(-L // CHUNK))
    states = 4 * K * V * (chunks - 1) / chunks  # nothing enters the first chunk or leaves the last one
    pairs = (min(L, CHUNK) + 1) / 2 * (3 * K + 2 * V)
    memory = sum(x.numel() * x.element_size() for x in (q, k, v, v, gate))
    return Cost(flops=B * L * H * directions * (states + pairs), bytes=memory)
