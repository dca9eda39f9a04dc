"""What the tests of the benchmark share: a clock that a test moves, a machine, rows, and a small op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ultrazoo.bench.machine import COPY, GEMM, Machine
from ultrazoo.bench.records import Row
from ultrazoo.bench.session import Bench
from ultrazoo.spec import Cost, OpSpec, Sample

CPU = torch.device("cpu")
MACHINE = Machine(
    name="a machine",
    device="cpu",
    cores=2,
    threads=1,
    cpu_kernels=None,
    library=None,
    system="Linux",
    python="3.11",
    torch="2",
    ultrazoo="0",
    clock="wall",
    load=0.0,
)


class Clock:
    """Stands still until a case moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def case(self, seconds: float | list[float], name: str = "") -> Callable[[], None]:
        times = iter(seconds) if isinstance(seconds, list) else None

        def run() -> None:
            self.now += next(times) if times else seconds
            self.order.append(name)

        return run


@dataclass
class StillBench:
    """A run on a still clock, beside a matrix product of 10 GFLOP/s and a copy of 20 GB/s; what it says is kept."""

    clock: Clock = field(default_factory=Clock)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limits = {GEMM: (self.clock.case(0.5), 5e9), COPY: (self.clock.case(0.1), 2e9)}
        self.bench = Bench(
            device=CPU, dtype=torch.float32, machine=MACHINE, clock=self.clock, seconds=0.0, say=self.said.append
        )


def rows_of(seconds: dict[str, list[float]], name: str = "x::y") -> list[Row]:
    """Rows at L = 64, 128, ... by backend."""
    return [
        Row(
            machine=MACHINE,
            kind="op",
            name=name,
            sample=f"B4 K8 L{64 << i}",
            backend=backend,
            direction="forward",
            dtype="float32",
            device="cpu",
            threads=1,
            clock="wall",
            tokens=256 << i,
            batch=4,
            length=64 << i,
            median_s=value,
            q1_s=0.9 * value,
            q3_s=1.1 * value,
            rounds=5,
            peak_bytes=None,
            flops=None,
            bytes=None,
            gemm_gflops=100.0,
            copy_gbytes=20.0,
        )
        for backend, values in seconds.items()
        for i, value in enumerate(values)
    ]


def double(x: Tensor) -> Tensor:
    """2 x."""
    return 2 * x


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for length in (8, 16):
        yield Sample(name=f"B2 D3 L{length}", args=(torch.ones(2, length, 3, dtype=dtype, device=device),))


def spec_of(op: Callable[..., Tensor], name: str = "test_bench::double") -> OpSpec:
    return OpSpec(
        name=name,
        op=op,
        reference=double,
        samples=samples,
        bench_samples=samples,
        cost=lambda sample: Cost(flops=sample.args[0].numel(), bytes=8 * sample.args[0].numel()),
        differentiable="ultrazoo" not in name,
        baselines={"add": lambda x: x + x},
    )
