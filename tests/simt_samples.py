"""Samples for the CUDA kernels beside those of the specs: beyond one tile, one span, one stage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_parts import random_segments

from ultrazoo.ops.bitlinear.samples import _Draw as Bitlinear
from ultrazoo.ops.bitlinear.samples import _packed
from ultrazoo.ops.retention.samples import _Draw as Retention
from ultrazoo.ops.selective_scan.samples import _Draw as Scan
from ultrazoo.spec import Sample

CPU = torch.device("cpu")


def samples(op: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Return those of an op, such as ``retention``."""
    if op in SAMPLES:
        yield from SAMPLES[op](dtype)


def _retention(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Retention(CPU, dtype)
    yield Sample(name="wide", args=draw.tensors(1, 70, 2, 68, 133))
    yield Sample(name="spans", args=draw.tensors(1, 330, 1, 5, 6))
    segments = random_segments(2, 330, seed=1)
    packed = {"segments": segments[:, :200]}
    yield Sample(name="packed at random", args=draw.tensors(2, 200, 1, 4, 8), kwargs=packed)
    kwargs = {"segments": segments, "chunk_size": 8}
    yield Sample(name="packed spans of several chunks", args=draw.tensors(2, 330, 1, 4, 8), kwargs=kwargs)


def _scan(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Scan(CPU, dtype)
    yield draw.sample("beyond one tile", 1, 560, 9, 9, full=True)
    segments = random_segments(1, 560, seed=2)
    yield draw.sample("packed beyond one tile", 1, 560, 3, 2, full=True, segments=segments, reverse=True)
    yield draw.sample("many sets of channels", 1, 40, 20, 40, full=False)


def _bitlinear(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Bitlinear(CPU, dtype)
    for tokens, k, n in ((70, 150, 66), (20, 272, 20), (7, 530, 20)):
        yield Sample(name=f"M{tokens} K{k} N{n}", args=(draw(tokens, k), draw.weight(n, k), draw(n)))


def _bitlinear_packed(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _bitlinear(dtype):
        x, weight, bias = sample.args
        yield Sample(name=sample.name, args=(x, *_packed(weight), bias))


SAMPLES = {
    "retention": _retention,
    "selective_scan": _scan,
    "bitlinear": _bitlinear,
    "bitlinear_packed": _bitlinear_packed,
}
