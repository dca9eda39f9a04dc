"""Compiled CPU kernels on samples of a test's own, in each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch

from ultrazoo.ops.loader import cpu_isa
from ultrazoo.registry import registry
from ultrazoo.spec import Sample
from ultrazoo.testing.parity import check_op, isas_of

CPU = torch.device("cpu")


def each_isa(op: str) -> pytest.MarkDecorator:
    """Parametrise a test by the instruction sets of an op's kernels; skip it where there are none."""
    levels = isas_of(registry().op(f"ultrazoo::{op}"), CPU)
    no_kernels = pytest.mark.skipif(cpu_isa() is None, reason="there are no compiled kernels")
    return pytest.mark.parametrize("isa", [pytest.param(isa, marks=no_kernels) for isa in levels])


def hold(
    op: str,
    samples: Callable[[torch.dtype], Iterable[Sample]],
    isa: str | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Hold a kernel to its reference on samples, by every check of the parity harness but opcheck."""
    spec = replace(registry().op(f"ultrazoo::{op}"), samples=lambda device, wanted: samples(wanted))
    found = list(check_op(spec, CPU, dtype, "compiled", isa=isa, opcheck=False))
    assert len(found) > 4
    bad = [f"{c.check}: error {c.error}, allowed {c.tolerance}: {c.detail}" for c in found if not c.ok]
    assert not bad, "\n".join(bad)


def random_segments(rows: int, length: int, seed: int) -> torch.Tensor:
    """Draw (rows, length) documents of 1 to 90 tokens, with gaps of padding between some of them."""
    draw = torch.Generator().manual_seed(seed)
    segments = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        start, number = 0, 1
        while start < length:
            n, gap = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 90), (0, 4)))
            segments[row, start : start + n] = number
            start, number = start + n + (gap if gap > 1 else 0), number + 1
    return segments
