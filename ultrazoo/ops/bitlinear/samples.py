"""Sample calls of the BitNet ops, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultrazoo.ops.bitlinear.reference import pack, ternarize
from ultrazoo.spec import Cost, Sample


class _Draw:
    """Random arguments for samples, always the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def weight(self, n: int, k: int) -> Tensor:
        return (0.02 * torch.randn(n, k, generator=self.generator)).to(self.device, self.dtype)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Small and nasty calls of ``bitlinear``."""
    draw = _Draw(device, dtype)
    for name, lead, k, n in (
        ("one token", (1,), 64, 32),
        ("vector", (), 33, 5),
        ("L63", (2, 63), 48, 80),
        ("L130, odd", (1, 130), 37, 19),
        ("K1 N1", (3,), 1, 1),
        ("six tokens", (6,), 300, 40),
        ("M70 K300", (70,), 300, 70),
        ("B0", (0, 5), 16, 24),
    ):
        yield Sample(name=name, args=(draw(*lead, k), draw.weight(n, k), draw(n)))
    yield Sample(name="no bias", args=(draw(2, 7, 40), draw.weight(16, 40)))
    yield Sample(name="strided", args=(draw(40, 2, 9).permute(2, 1, 0), draw.weight(40, 24).mT, draw(48)[::2]))
    yield Sample(name="fp32 master weight", args=(draw(2, 7, 40), draw.weight(24, 40).to(draw.wide), draw(24)))
    yield Sample(name="zero tokens and weight", args=(draw(3, 20) * 0, draw.weight(6, 20) * 0, draw(6)))
    yield Sample(name="large eps", args=(draw(3, 20), draw.weight(6, 20), draw(6)), kwargs={"eps": 0.5})


def packed_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """The same calls of ``bitlinear_packed``, and the largest sums that can occur."""
    for sample in samples(device, dtype):
        x, weight, *bias = sample.args
        yield Sample(name=sample.name, args=(x, *_packed(weight), *bias), kwargs=sample.kwargs)
    draw = _Draw(device, dtype)
    ones = torch.ones(17, 2000, device=device)
    yield Sample(name="largest sums", args=(draw(2, 2000) * 0 + 1, *_packed(ones)))


def bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Realistic calls of ``bitlinear``."""
    draw = _Draw(device, dtype)
    for m, k, n in ((512, 768, 3072), (2048, 768, 768), (2048, 768, 3072), (2048, 3072, 768)):
        args = (draw(m, k), draw.weight(n, k).to(draw.wide), draw(n))
        yield Sample(name=f"M{m} K{k} N{n}", args=args)


def packed_bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Realistic calls of ``bitlinear_packed``."""
    draw = _Draw(device, dtype)
    for k, n in ((768, 768), (768, 3072), (2048, 8192)):
        packed = _packed(draw.weight(n, k))
        for m in (1, 32, 512):
            yield Sample(name=f"M{m} K{k} N{n}", args=(draw(m, k), *packed))


def cost(sample: Sample) -> Cost:
    """One multiplication and addition for each weight and token; x, W and y moved once."""
    x, weight = sample.args[:2]
    n, k = weight.shape
    tokens = x.numel() // k
    moved = x.numel() * x.element_size() + weight.numel() * weight.element_size() + tokens * n * x.element_size()
    return Cost(flops=2.0 * tokens * n * k, bytes=moved)


def packed_cost(sample: Sample) -> Cost:
    """The same, with two bits a weight."""
    x, packed, scale = sample.args[:3]
    n, k = scale.shape[0], x.shape[-1]
    tokens = x.numel() // k
    moved = x.numel() * x.element_size() + packed.numel() + 4 * n + tokens * n * x.element_size()
    return Cost(flops=2.0 * tokens * n * k, bytes=moved)


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = ternarize(weight, 1e-5)
    return pack(codes), scale.to(torch.float32).expand(weight.shape[0]).contiguous()
