"""Sample calls of the selective scan, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ultrazoo.spec import Cost, Sample


class _Draw:
    """Random arguments for samples, always the same, of the sizes that Mamba's initialisation gives."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def sample(self, name: str, batch: int, length: int, dim: int, state: int, *, full: bool, **kwargs: Any) -> Sample:
        """With D, z, delta_bias and softplus, or without any of them."""
        u, z = self.normal(batch, length, dim), self.normal(batch, length, dim)
        B, C = self.normal(batch, length, state), self.normal(batch, length, state)
        A = -torch.arange(1.0, state + 1).expand(dim, state).contiguous().to(self.device, self.wide)
        step = 10 ** (-3 + 2 * torch.rand(dim, generator=self.generator))
        if not full:
            delta = step * torch.rand(batch, length, dim, generator=self.generator) * 2
            return Sample(name=name, args=(u, delta.to(self.device, self.dtype), A, B, C), kwargs=kwargs)
        D = torch.randn(dim, generator=self.generator).to(self.device, self.wide)
        delta_bias = step.expm1().log().to(self.device, self.wide)
        kwargs |= {"z": z, "delta_bias": delta_bias, "delta_softplus": True}
        return Sample(name=name, args=(u, self.normal(batch, length, dim), A, B, C, D), kwargs=kwargs)

    def segments(self, rows: list[list[tuple[int, int]]]) -> Tensor:
        """(batch, length) from (number, length) pairs."""
        return torch.tensor([[n for n, length in row for _ in range(length)] for row in rows], device=self.device)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Small and nasty calls."""
    draw = _Draw(device, dtype)
    for length in (1, 32, 63, 130):
        for reverse in (False, True):
            name = f"L{length}{' reverse' * reverse}"
            yield draw.sample(name, 2, length, 5, 4, full=length != 63, reverse=reverse)
    yield draw.sample("B0", 0, 5, 4, 2, full=True)
    yield draw.sample("L0", 2, 0, 4, 2, full=True)
    yield draw.sample("N1", 3, 40, 33, 1, full=True)
    yield draw.sample("N17 dim 1", 1, 35, 1, 17, full=False)

    packed = draw.segments(
        [[(0, 2), (1, 30), (2, 32), (3, 1), (0, 15)], [(4, 80)], [(0, 80)], [(1, 31), (7, 40), (2, 8), (0, 1)]]
    )
    for reverse in (False, True):
        yield draw.sample(f"packed{' reverse' * reverse}", 4, 80, 6, 3, full=True, segments=packed, reverse=reverse)
    gaps = draw.segments(
        [[(0, 2), (5, 29), (0, 1), (5, 20), (0, 7), (5, 9), (3, 1), (0, 1)], [(2, 70)], [(1, 1), (0, 1)] * 35]
    )
    for reverse in (False, True):
        yield draw.sample(f"gaps{' reverse' * reverse}", 3, 70, 6, 3, full=reverse, segments=gaps, reverse=reverse)
    padded = draw.segments([[(1, 20), (0, 13)], [(1, 33)]])
    yield draw.sample("padded, bare", 2, 33, 5, 4, full=False, segments=padded)

    sample = draw.sample("", 2, 40, 6, 4, full=True)
    u, delta, A, B, C, D = sample.args
    fused = torch.stack((u, sample.kwargs["z"]), dim=2)  # (batch, length, u z, dim), as an in_proj leaves them
    kwargs = {**sample.kwargs, "z": fused[:, :, 1]}
    by_channel = delta.mT.contiguous().mT
    bc = torch.cat((B, C), dim=2).split(4, dim=2)
    yield Sample(name="strided", args=(fused[:, :, 0], by_channel, A.mT.contiguous().mT, *bc, D), kwargs=kwargs)

    large = draw.sample("", 2, 40, 3, 4, full=True)
    u, delta, A, *rest = large.args
    yield Sample(name="large steps", args=(u, delta * 30, A, *rest), kwargs=large.kwargs)


def bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Realistic calls."""
    draw = _Draw(device, dtype)
    for dim, lengths in ((384, (128, 256, 512, 1024, 2048, 4096)), (1536, (256, 1024))):
        for length in lengths:
            yield draw.sample(f"B4 D{dim} N16 L{length}", 4, length, dim, 16, full=True)
    packed = draw.segments([[(1, 300), (2, 500), (3, 150), (0, 74)]] * 4)
    yield draw.sample("B4 D384 N16 L1024 packed", 4, 1024, 384, 16, full=True, segments=packed)


def cost(sample: Sample) -> Cost:
    """9 operations, the exponential counted as one, for each number of state and step; each array moved once."""
    u, A = sample.args[0], sample.args[2]
    tensors = [x for x in (*sample.args, *sample.kwargs.values(), u) if isinstance(x, Tensor)]
    return Cost(flops=9.0 * u.numel() * A.shape[1], bytes=sum(x.numel() * x.element_size() for x in tensors))
