"""Times several ways of doing the same thing in one interleaved run, so that a busy machine slows all of them alike."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

LEAST_SECONDS, MOST_REPEATS = 5e-3, 1000
"""A measurement repeats a short call for about this long."""
LONG_SECONDS = 0.05
"""A shorter call is measured after as many untimed ones: the case before took the caches, and perhaps the memory that
the allocator kept."""
LEAST_ROUNDS, LEAST_LONG_ROUNDS, MOST_ROUNDS = 5, 3, 1000
"""Three rounds are enough where they take more than twice the time."""

Case = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the rounds; and the bytes that a call adds to the peak of memory."""

    median: float
    lower: float
    upper: float
    rounds: int
    peak_bytes: int | None

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.upper - self.lower) / 2 / self.median


def interleave(
    cases: Mapping[str, Case],
    device: torch.device,
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Call every case once per round, in turn, until the time is up; each round begins with the next case.

    Short calls are measured warm. Before the rounds every case is called once to warm up, once with its memory watched,
    and then as often as it takes to tell how many calls a measurement needs.

    Args:
        cases: Name -> function without arguments.
        device: Where they run; a GPU is synchronised around each measurement.
        seconds: Time for all rounds together; there are at least five, or three long ones.
        clock: Returns seconds.
    """
    for case in cases.values():
        case()
    peak = {name: peak_memory(case, device) for name, case in cases.items()}
    plans = {name: _plan(case, device, clock) for name, case in cases.items()}
    found: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    start, rounds = clock(), 0
    while _another(rounds, clock() - start, seconds):
        for name in order:
            found[name].append(_measure(cases[name], *plans[name], device, clock))
        order.append(order.pop(0))
        rounds += 1
    return {name: _summary(values, peak[name]) for name, values in found.items()}


def _another(rounds: int, spent: float, seconds: float) -> bool:
    least = LEAST_LONG_ROUNDS if spent > 2 * seconds else LEAST_ROUNDS
    return rounds < least or (spent < seconds and rounds < MOST_ROUNDS)


def _plan(case: Case, device: torch.device, clock: Clock) -> tuple[int, int]:
    """Choose how many untimed and how many timed calls make up one measurement."""
    start, calls = clock(), 0
    while calls < MOST_REPEATS and (calls == 0 or clock() - start < LEAST_SECONDS):
        case()
        _synchronize(device)
        calls += 1
    once = (clock() - start) if calls == 1 else _measure(case, 0, calls, device, clock)
    repeats = max(1, min(MOST_REPEATS, int(LEAST_SECONDS / max(once, 1e-7))))
    return (repeats if once < LONG_SECONDS else 0), repeats


def _measure(case: Case, untimed: int, repeats: int, device: torch.device, clock: Clock) -> float:
    for _ in range(untimed):
        case()
    _synchronize(device)
    start = clock()
    for _ in range(repeats):
        case()
    _synchronize(device)
    return (clock() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(values: list[float], peak_bytes: int | None) -> Timing:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, rounds=len(values), peak_bytes=peak_bytes)


def peak_memory(case: Case, device: torch.device) -> int | None:
    """Return the bytes that one call adds to the peak of the process; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not (status.exists() and reset.exists()):
        return None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not there for this one to take unseen
    try:
        reset.write_text("5")  # the high-water mark starts again from here
    except OSError:
        return None
    before = _kib(status, "VmRSS")
    case()
    return max(0, _kib(status, "VmHWM") - before) * 1024


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that may still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    return _kib(info, "MemAvailable") * 1024 if device.type == "cpu" and info.exists() else None


def _kib(table: Path, key: str) -> int:
    line = next(line for line in table.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])
