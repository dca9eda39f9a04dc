"""Every op on its realistic samples, by every backend, forward and with its gradients; parity comes first.

Sizes are those without a length and those of 1024 tokens. ``ultrazoo bench OP`` has the rest, and interleaves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ultrazoo.bench.gate import kernel_of, require_parity
from ultrazoo.bench.machine import describe
from ultrazoo.bench.ops import length_of, ways
from ultrazoo.bench.session import Bench
from ultrazoo.ops import kernel_policy
from ultrazoo.ops.library import NAMESPACE
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec
from ultrazoo.train.runtime import keep_memory

CPU, DTYPE = torch.device("cpu"), torch.float32
LENGTHS = (None, 1024)


def cases() -> Iterator[object]:
    """An op, the name of one of its samples, a backend and a direction for each benchmark."""
    for name, spec in registry().ops().items():
        own = "compiled" if name.startswith(f"{NAMESPACE}::") else "op"
        backends = [own, "reference", *spec.baselines]
        samples = [sample.name for sample in spec.bench_samples(CPU, DTYPE) if length_of(sample) in LENGTHS]
        for sample in samples:
            for direction in ("forward", "training") if spec.differentiable else ("forward",):
                for backend in backends:
                    label = f"{name.partition('::')[2]}-{sample}-{direction}-{backend}".replace(" ", "_")
                    yield pytest.param(spec, sample, backend, direction == "training", id=label)


@pytest.fixture(scope="session", autouse=True)
def memory_is_kept() -> None:
    """As in training: freed memory stays with the process."""
    keep_memory()


@pytest.fixture(scope="session")
def bench() -> Bench:
    """Settings of the session, and the ops that hold parity."""
    return Bench(device=CPU, dtype=DTYPE, machine=describe(CPU))


@pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=True, warmup_iterations=2, min_time=2e-3)
@pytest.mark.parametrize(("spec", "name", "backend", "backward"), list(cases()))
def test_op(benchmark: BenchmarkFixture, bench: Bench, spec: OpSpec, name: str, backend: str, backward: bool) -> None:
    if not any(check.subject == spec.name for check in bench.parity):
        bench.parity += require_parity([spec], CPU, DTYPE, print)
    status = kernel_of(spec, CPU)
    if backend == "compiled" and status and not status.compiled:
        pytest.skip(f"no compiled kernel: {status.detail}")
    bench.backends, bench.backward = (backend,), backward
    sample = next(sample for sample in spec.bench_samples(CPU, DTYPE) if sample.name == name)
    with torch.set_grad_enabled(backward), kernel_policy("auto"):
        case = ways(bench, spec, sample)[backend]
        benchmark.group = f"{spec.name} {name} {'forward + backward' if backward else 'forward'}"
        benchmark.extra_info["machine"] = str(bench.machine)
        benchmark(case)
