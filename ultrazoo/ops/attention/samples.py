"""Sample calls of attention, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultrazoo.spec import Cost, Sample


class _Draw:
    """Random arguments for samples, always the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def tensors(self, B: int, L: int, H: int, K: int, V: int, prefix: int = 0) -> tuple[Tensor, ...]:
        shapes = ((B, L, H, K), (B, prefix + L, H, K), (B, prefix + L, H, V))
        q, k, v = (torch.randn(shape, generator=self.generator).to(self.device, self.dtype) for shape in shapes)
        return q, k, v

    def segments(self, rows: list[list[tuple[int, int]]]) -> Tensor:
        """(B, L) from (number, length) pairs."""
        return torch.tensor([[n for n, length in row for _ in range(length)] for row in rows], device=self.device)


GAPS = [[(0, 3), (2, 20), (0, 1), (2, 28), (0, 2), (1, 1), (0, 2), (1, 1)], [(4, 58)], [(1, 1), (0, 1)] * 29]
PACKED = [[(0, 3), (1, 61), (2, 49), (3, 1), (0, 16)], [(4, 130)], [(0, 130)], [(1, 48), (7, 75), (2, 5), (0, 2)]]


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Small and nasty calls."""
    draw = _Draw(device, dtype)
    some = {"dropout": 0.25, "seed": torch.tensor(0x0123456789ABCDEF)}
    for kind in ("softmax", "sigmoid"):
        for L, K, V in ((1, 8, 16), (63, 5, 3), (130, 26, 26)):
            yield Sample(name=f"{kind} L{L}", args=draw.tensors(2, L, 3, K, V), kwargs={"kind": kind})
            yield Sample(name=f"{kind} L{L} dropout", args=draw.tensors(1, L, 2, V, K), kwargs={"kind": kind, **some})
        packed = {"segments": draw.segments(PACKED), "kind": kind}
        yield Sample(name=f"{kind} packed", args=draw.tensors(4, 130, 2, 8, 8), kwargs=packed)
        yield Sample(name=f"{kind} packed dropout", args=draw.tensors(4, 130, 2, 32, 17), kwargs={**packed, **some})
        gaps = {"segments": draw.segments(GAPS), "kind": kind, **some}
        yield Sample(name=f"{kind} gaps", args=draw.tensors(3, 58, 2, 8, 5, 2), kwargs={**gaps, "prefix": 2})
        prefixed = {**packed, **some, "prefix": 4}
        yield Sample(name=f"{kind} prefix", args=draw.tensors(4, 130, 2, 8, 8, 4), kwargs=prefixed)
        yield Sample(name=f"{kind} L270", args=draw.tensors(1, 270, 1, 6, 6), kwargs={"kind": kind, "scale": 2.0})
        yield Sample(name=f"{kind} L270 dropout", args=draw.tensors(1, 270, 1, 6, 6), kwargs={"kind": kind, **some})
        yield Sample(name=f"{kind} B0", args=draw.tensors(0, 7, 2, 4, 4), kwargs={"kind": kind})
    small = {"segments": draw.segments([[(1, 4), (2, 3), (0, 2)]]), **some}
    yield Sample(name="prefix, small", args=draw.tensors(1, 9, 2, 3, 2, 5), kwargs={"prefix": 5, **small})
    yield Sample(name="L0", args=draw.tensors(2, 0, 2, 4, 4))
    q, k, v = draw.tensors(2, 33, 3, 8, 8)
    yield Sample(name="by head", args=tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)))
    yield Sample(name="peaked", args=(40 * q, k, v))


def bench_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of realistic size."""
    draw = _Draw(device, dtype)
    packed = draw.segments([[(1, 20), (2, 45), (3, 33), (4, 30)]] * 32)
    for B, H, L, K in ((32, 12, 128, 26), (32, 12, 128, 64), (8, 12, 512, 64), (2, 12, 2048, 64)):
        for p in (0.0, 0.1):
            name = f"B{B} H{H} L{L} K{K}{' dropout' * bool(p)}"
            yield Sample(name=name, args=draw.tensors(B, L, H, K, K), kwargs={"dropout": p})
    for p in (0.0, 0.1):
        kwargs = {"segments": packed, "dropout": p}
        yield Sample(name=f"packed{' dropout' * bool(p)}", args=draw.tensors(32, 128, 12, 26, 26), kwargs=kwargs)
    sigmoid = {"kind": "sigmoid", "dropout": 0.1}
    yield Sample(name="sigmoid B8 H12 L512 K64 dropout", args=draw.tensors(8, 512, 12, 64, 64), kwargs=sigmoid)


def cost(sample: Sample) -> Cost:
    """The two matrix products over the pairs of one document."""
    q, k, v = sample.args
    segments, prefix = sample.kwargs.get("segments"), int(sample.kwargs.get("prefix", 0))
    B, L, H, K = q.shape
    if segments is None:
        pairs = float(B * L * (prefix + L))
    else:
        same = segments[:, :, None].eq(segments[:, None]) & segments.ne(0)[:, None]
        pairs = float(same.sum() + prefix * segments.ne(0).sum())
    moved = sum(x.numel() * x.element_size() for x in (q, k, v)) + B * L * H * v.shape[3] * v.element_size()
    return Cost(flops=2 * H * pairs * (K + v.shape[3]), bytes=moved)
