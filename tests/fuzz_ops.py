"""Calls the raw ops with valid, wrong and random arguments: ``python tests/fuzz_ops.py --calls 10000``.

For each op and direction a third of the calls is valid and compared with the reference, a third has exactly one wrong
argument, which both must reject, and a third is random. Calls run in forked children of one process, which itself runs
one thread and no op; each child has a time limit. Tensors end, or begin, at a page that cannot be read, so an access
beyond them ends the child with a signal. Prints accepted and rejected calls per op and direction, and returns 1 if a
call ended with a signal or in time-out, a wrong call was accepted, a valid one rejected, or results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_cases import Case, call, make
from fuzz_memory import guarded
from fuzz_signatures import DIRECTIONS

from ultrazoo.ops.loader import cpu_isa, load, use_cpu_isa
from ultrazoo.registry import registry

KINDS = ("valid", "one wrong", "random")
SECONDS = 60
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
ISAS = ("portable", "avx2", "avx512", "avx512vnni")


@dataclass
class Tally:
    """What became of the calls of one op and direction."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run the calls, print the table, and return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="calls per child")
    parser.add_argument("--only", help="one call, as reported: 'retention backward 17'")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    registry().ops()  # defines them
    if load().handle is None:
        print(f"fuzz: no compiled kernels: {load().reason}; {load().fix}", file=sys.stderr)
        return 1
    if asked.only:
        name, direction, index = asked.only.rsplit(" ", 2)
        print(run_one(asked.seed, name, direction, int(index)))
        return 0
    start = time.monotonic()
    tallies = fuzz(asked.calls, asked.seed, asked.batch)
    print(table(tallies))
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    for failure in failures:
        print(f"FAILED {failure}")
    total = sum(count for tally in tallies.values() for count in tally.counts.values())
    print(f"{total} calls of {len(tallies)} ops and directions in {time.monotonic() - start:.0f} s: ", end="")
    print(f"{len(failures)} failed" if failures else "no signal, nothing wrong accepted, no results apart")
    return bool(failures)


def fuzz(calls: int, seed: int, batch: int) -> dict[tuple[str, str], Tally]:
    """Spread the calls over all ops and directions, and run them in children."""
    tallies = {key: Tally() for key in DIRECTIONS}
    for number, (name, direction) in enumerate(DIRECTIONS):
        count = calls // len(DIRECTIONS) + (number < calls % len(DIRECTIONS))
        next_index = 0
        while next_index < count:
            stop = min(next_index + batch, count)
            next_index = in_child(tallies[name, direction], seed, name, direction, next_index, stop)
    return tallies


def in_child(tally: Tally, seed: int, name: str, direction: str, start: int, stop: int) -> int:
    """Run calls in a forked child; return the index of the next one to run."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            with os.fdopen(writer, "w", buffering=1) as out:
                for index in range(start, stop):
                    out.write(f"{index}\n")
                    out.write(json.dumps(run_one(seed, name, direction, index)) + "\n")
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    lines, timed_out = listen(reader, pid)
    _, status = os.waitpid(pid, 0)
    begun = start
    for line in lines:
        if line.startswith("["):
            kind, outcome, failure = json.loads(line)
            tally.counts[kind, outcome] += 1
            if failure:
                tally.failures.append(f"{name} {direction} {begun}: {kind}: {failure}")
        else:
            begun = int(line)
    if status == 0 and not timed_out:
        return stop
    how = f"not done after {SECONDS} s" if timed_out else f"status {os.waitstatus_to_exitcode(status)}"
    kind = KINDS[begun % len(KINDS)]
    tally.counts[kind, "died"] += 1
    tally.failures.append(f"{name} {direction} {begun}: {kind}: the process ended with {how}")
    return begun + 1


def listen(reader: int, pid: int) -> tuple[list[str], bool]:
    """Read a child's lines until it ends or its time is up."""
    until = time.monotonic() + SECONDS
    data = b""
    timed_out = False
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            timed_out = True
        more = os.read(reader, 1 << 16)
        if not more:
            break
        data += more
    os.close(reader)
    return [line for line in data.decode().split("\n")[:-1] if line], timed_out


def run_one(seed: int, name: str, direction: str, index: int) -> tuple[str, str, str]:
    """Run one call on the kernel and on the reference.

    Returns:
        Its kind; accepted or rejected, by the kernel; what is wrong about that, or nothing.
    """
    rng = random.Random(f"{seed} {name} {direction} {index}")
    torch.manual_seed(rng.randrange(1 << 30))
    kind = KINDS[index % len(KINDS)]
    case = make(name, direction, kind, rng)
    arguments = {key: guarded(value, rng) for key, value in case.arguments.items()}
    with use_cpu_isa(rng.choice(ISAS[: ISAS.index(cpu_isa() or ISAS[0]) + 1])):
        got, error = attempt(case, arguments, "default")
    want, reference_error = attempt(case, arguments, "reference")
    outcome = "rejected" if error else "accepted"
    return kind, outcome, verdict(case, kind, (got, error), (want, reference_error))


def attempt(case: Case, arguments: dict[str, Any], backend: str) -> tuple[list[torch.Tensor], str]:
    """Call an op; return its results and gradients, or what it raises."""
    try:
        return call(case, arguments, backend), ""
    except (RuntimeError, ValueError, TypeError) as error:
        return [], f"{type(error).__name__}: {error}"


def verdict(case: Case, kind: str, kernel: tuple[list[torch.Tensor], str], twin: tuple[list[torch.Tensor], str]) -> str:
    """Return what is wrong with the outcomes of the kernel and the reference, or nothing."""
    (got, error), (want, twin_error) = kernel, twin
    for each in (error, twin_error):
        if each and "ultrazoo::" not in each and ": segments[row " not in each:
            return f"unclear message for {case.wrong or 'random arguments'}: {each[:300]}"
    if kind == "valid" and (error or twin_error):
        return f"rejected: {error or twin_error}"
    if kind == "one wrong" and not error:
        return f"accepted with {case.wrong}"
    if kind == "one wrong" and not twin_error and not case.reference_takes:
        return f"accepted by the reference with {case.wrong}"
    if twin_error and not error:
        return f"accepted, but the reference says: {twin_error}"
    if error and not twin_error and kind == "random" and "float64" not in error:
        return f"accepted by the reference alone: {error}"
    return apart(got, want) if case.comparable and not error else ""


def apart(got: list[torch.Tensor], want: list[torch.Tensor]) -> str:
    """Return how far results are apart if that is more than rounding."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {index}: {tuple(a.shape)} {a.dtype}, the reference's is {tuple(b.shape)} {b.dtype}"
        if a.numel() == 0:
            continue
        a, b = a.double(), b.double()
        scale = max(1.0, float(b.abs().max()))
        error = float((a - b).abs().max()) / scale
        if not error <= TOLERANCES.get(got[index].dtype, 1.0):
            return f"result {index}: {error:.1e} apart from the reference"
    return ""


def table(tallies: dict[tuple[str, str], Tally]) -> str:
    """Return accepted and rejected calls per op and direction."""
    head = "| op | direction | " + " | ".join(f"{kind}: accepted / rejected" for kind in KINDS) + " | died | failed |"
    rows = [head, "|---|---|" + "---|" * (len(KINDS) + 2)]
    for (name, direction), tally in tallies.items():
        cells = [f"{tally.counts[kind, 'accepted']} / {tally.counts[kind, 'rejected']}" for kind in KINDS]
        died = sum(tally.counts[kind, "died"] for kind in KINDS)
        rows.append(f"| {name} | {direction} | {' | '.join(cells)} | {died} | {len(tally.failures)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
