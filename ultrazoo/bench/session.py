"""One benchmark run: where and how it measures, what it has found, and what it has learned to leave out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ultrazoo.bench.machine import COPY, GEMM, Machine, ceilings
from ultrazoo.bench.records import Direction, Row, Task
from ultrazoo.bench.timing import Case, Clock, Timing, free_memory, interleave
from ultrazoo.errors import UnknownNameError
from ultrazoo.testing.parity import Check

PATIENCE = 20.0
"""Seconds that one call may be expected to take before it is left out."""


@dataclass
class Bench:
    """Settings of a run, and the rows found so far.

    Args:
        device: Where to run.
        dtype: Of the floating-point tensors.
        machine: Goes into every row.
        seconds: Measuring time for each sample, all its backends together.
        backward: Time the forward and the backward together.
        backends: Names asked for; None: every one that is quick to prepare.
        say: Takes a line about the run.
        progress: Takes what is being measured, a few times a second at most.
        clock: Returns seconds.
    """

    device: torch.device
    dtype: torch.dtype
    machine: Machine
    seconds: float = 1.0
    backward: bool = False
    backends: tuple[str, ...] | None = None
    say: Callable[[str], None] = print
    progress: Callable[[str], None] = lambda text: None
    clock: Clock = time.perf_counter
    rows: list[Row] = field(default_factory=list)
    parity: list[Check] = field(default_factory=list)
    _known: dict[tuple[str, str], list[Row]] = field(default_factory=dict)
    _refused: set[tuple[str, str]] = field(default_factory=set)
    _told: set[str] = field(default_factory=set)

    @property
    def direction(self) -> Direction:
        """What is timed of an op or a block."""
        return "forward + backward" if self.backward else "forward"

    def wants(self, backend: str, default: bool = True) -> bool:
        """Tell whether a backend is to be timed."""
        return default if self.backends is None else backend in self.backends

    def check_backends(self, known: tuple[str, ...]) -> None:
        """Refuse a backend that nothing here offers.

        Raises:
            UnknownNameError: There is one.
        """
        for name in self.backends or ():
            if name not in known:
                raise UnknownNameError("--backend", name, known)

    def tell_once(self, text: str) -> None:
        """Say a line that would otherwise come up for every sample."""
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    def measure(self, task: Task, family: str, ways: Mapping[str, Case]) -> list[Row]:
        """Time every way of doing one task together with the machine's ceilings, in the same rounds.

        A way that took very long or very much memory on a shorter sample of the family is left out, with a line.

        Args:
            task: What is done.
            family: Samples that differ in length alone have the same one.
            ways: Backend -> function that does the task once.

        Returns:
            The rows, in the order of ``ways``; they are added to ``rows`` too.
        """
        ways = {name: case for name, case in ways.items() if self._bearable(task, family, name)}
        if not ways:
            return []
        self.progress(f"{task.name} {task.sample}")
        limits = ceilings(self.device, self.dtype)
        cases = {**{name: case for name, (case, _) in limits.items()}, **ways}
        timings = interleave(cases, self.device, seconds=self.seconds, clock=self.clock)
        gemm, copy = (limits[name][1] / timings[name].median / 1e9 for name in (GEMM, COPY))
        rows = [self._row(task, name, timings, gemm, copy) for name in ways]
        for row in rows:
            self._known.setdefault((family, row.backend), []).append(row)
        self.rows += rows
        return rows

    def _row(
        self, task: Task, backend: str, timings: Mapping[str, Timing], gemm_gflops: float, copy_gbytes: float
    ) -> Row:
        timing = timings[backend]
        return Row(
            machine=self.machine,
            kind=task.kind,
            name=task.name,
            sample=task.sample,
            backend=backend,
            direction=task.direction,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            threads=self.machine.threads,
            clock=self.machine.clock,
            tokens=task.tokens,
            batch=task.batch,
            length=task.length,
            median_s=timing.median,
            q1_s=timing.lower,
            q3_s=timing.upper,
            rounds=timing.rounds,
            peak_bytes=timing.peak_bytes,
            flops=task.cost.flops if task.cost else None,
            bytes=task.cost.bytes if task.cost else None,
            gemm_gflops=gemm_gflops,
            copy_gbytes=copy_gbytes,
            gemm_spread=timings[GEMM].spread,
            copy_spread=timings[COPY].spread,
        )

    def _bearable(self, task: Task, family: str, backend: str) -> bool:
        """Tell whether time and memory of a call, as they grew so far, will be small enough at a greater length."""
        known = self._known.get((family, backend), [])
        if not known or not task.length or task.length <= (known[-1].length or 0):
            return True
        free = free_memory(self.device)
        seconds = _expected(task, [(row, row.median_s) for row in known])
        peak = _expected(task, [(row, float(row.peak_bytes or 0)) for row in known])
        if seconds > PATIENCE:
            reason = f"might take {seconds:.0f} s a call"
        elif free is not None and peak > free / 2:
            reason = f"might take {peak / 2**30:.1f} GiB, of {free / 2**30:.1f} free"
        else:
            return True
        if (family, backend) not in self._refused:
            self._refused.add((family, backend))
            self.say(f"{family}: {backend} is left out from L = {task.length} on: it {reason}")
        return False


def _expected(task: Task, known: Sequence[tuple[Row, float]]) -> float:
    """Extrapolate a quantity of a call, which per token is a power of the length between 0 and 1.

    The power is that of the two latest rows; with one row, the worst is expected.
    """
    row, last = known[-1]
    power = 1.0
    if len(known) > 1:
        row_before, before = known[-2]
        longer = (row.length or 1) / (row_before.length or 1)
        if before > 0 and last > 0 and longer > 1:
            power = min(1.0, max(0.0, math.log(last / row.tokens * row_before.tokens / before) / math.log(longer)))
    return last * task.tokens / row.tokens * ((task.length or 1) / (row.length or 1)) ** power
