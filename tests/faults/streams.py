"""Output that nobody takes, and hangups: the run continues, and a signal still leaves a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from faults.parts import Bench, checkpoints, expect_whole, last_step, sets
from faults.process import Hook, Running, check, cli
from faults.registry import Came, fault

LONG = sets(max_steps=100_000)
STREAMS = (1, 2)


def to(descriptor: int, *unused: int, then: Hook | None = None) -> Hook:
    """Standard output and error go to a descriptor; the process has none of ``unused``."""

    def plant() -> None:
        for number in STREAMS:
            os.dup2(descriptor, number)
        for number in {descriptor, *unused}:
            os.close(number)
        if then is not None:
            then()

    return plant


def into_pipe(start: Callable[[Hook], Running], then: Hook | None = None) -> tuple[Running, int]:
    """Start a process whose output goes into a pipe; return it and the end that reads."""
    reader, writer = os.pipe()
    process = start(to(writer, reader, then=then))
    os.close(writer)
    return process, reader


def signalled_at(place: str, number: signal.Signals) -> Hook:
    """The process gets a signal from itself where it does something for the second time."""

    def plant() -> None:
        from ultrazoo.train import loop, store

        owner, name = {"validation": (loop, "evaluate"), "save": (store, "write_checkpoint")}[place]
        real, count = getattr(owner, name), [0]

        def call(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), number)
            return real(*arguments)

        setattr(owner, name, call)

    return plant


def expect_last_step(run: Path, code: int, ended: int) -> int:
    """Fail unless a run ended with a code after a checkpoint of its last step; return the step."""
    check(ended == code, f"exit code {ended}, expected {code}")
    kept, last = expect_whole(run), last_step(run)
    check(kept and kept[-1].name == f"step-{last:06d}", f"{[path.name for path in kept]}, last step {last}")
    return last


def reader_goes(bench: Bench, folder: Path, moments: Iterable[tuple[signal.Signals, int]]) -> int:
    """Close the pipe at a step, send the signal two steps later, expect the checkpoint and resume; return the tries."""
    tries = 0
    for number, step in moments:
        run = folder / f"{number.name}-{step}"
        process, reader = into_pipe(lambda hook, run=run: bench.train(folder, run, *LONG, hook=hook))
        if step:
            process.until(lambda run=run, step=step: last_step(run) >= step)
        os.close(reader)
        process.until(lambda run=run, step=step: last_step(run) >= step + 2)
        process.send(number)
        last = expect_last_step(run, 128 + number, process.wait().code)
        bench.resume(folder, run, *sets(max_steps=last + 1)).wait().expect(0)
        tries += 1
    return tries


@fault("34q", "the reader of the output goes away, then a signal", quick=True)
def reader_gone_once(bench: Bench, folder: Path) -> Came:
    reader_goes(bench, folder, [(signal.SIGINT, 3)])
    return Came("left a checkpoint of the last step and the documented exit code", "nothing")


@fault("34", "the reader of the output goes away, as tee does at Ctrl-C, then a signal")
def reader_gone(bench: Bench, folder: Path) -> Came:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    tries = reader_goes(bench, folder, [(number, step) for number in numbers for step in (0, 3, 9)])
    for place, number in (("validation", signal.SIGINT), ("save", signal.SIGTERM), ("save", signal.SIGHUP)):
        run = folder / f"{place}-{number.name}"
        own = signalled_at(place, number)
        process, reader = into_pipe(lambda hook, run=run: bench.train(folder, run, hook=hook), then=own)
        os.close(reader)
        expect_last_step(run, 128 + number, process.wait().code)
        bench.resume(folder, run).wait().expect(0)
        bench.expect_straight(run)
        tries += 1
    return Came(f"{tries} of {tries} tries left a checkpoint of the last step and the documented exit code", "nothing")


@fault("34b", "output into a full disk, a closed descriptor, a lost terminal")
def no_output(bench: Bench, folder: Path) -> Came:
    full = os.open("/dev/full", os.O_WRONLY)
    bench.train(folder, "full", hook=to(full)).wait().expect(0)
    os.close(full)
    bench.train(folder, "closed", hook=lambda: [os.close(number) for number in (0, *STREAMS)]).wait().expect(0)
    master, slave = os.openpty()
    bar = to(slave, master, then=lambda: os.environ.update(TERM="xterm"))
    process = bench.train(folder, "terminal", hook=bar)
    os.close(slave)
    process.until(lambda: last_step(folder / "terminal") >= 2)
    os.close(master)
    process.wait().expect(0)
    for run in ("full", "closed", "terminal"):
        bench.expect_straight(folder / run)
    return Came("what could not be written was dropped; all three ran to the end, equal to the bit", "the messages")


@fault("34c", "a reader that does not read, then SIGTERM")
def reader_stalled(bench: Bench, folder: Path) -> Came:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    process = bench.train(folder, "run", *LONG, hook=to(writer, reader))
    time.sleep(1.0)
    check(process.poll() is None, "ended")
    process.send(signal.SIGTERM)
    code = process.wait(30).code
    check(code == 128 + signal.SIGTERM, f"exit code {code}")
    os.close(reader)
    os.close(writer)
    bench.resume(folder).wait().expect(0)
    bench.expect_straight(folder / "run")
    return Came("waited for its reader until SIGTERM, then dropped the messages and ended with exit 143", "nothing")


def hang_up(bench: Bench, run: Path, number: signal.Signals) -> None:
    """Send a signal three times, as the kernel and the shell do when a terminal is lost; expect the checkpoint."""
    process = bench.train(run.parent, run, *LONG, hook=slow_steps)
    process.until(lambda: last_step(run) >= 3)
    for _ in range(3):
        process.send(number)
        time.sleep(0.01)
    ended = process.wait().expect(128 + number, f"{number.name}: stopped after step", "continue with --resume auto")
    expect_last_step(run, 128 + number, ended.code)


@fault("35q", "SIGHUP three times", quick=True)
def hangup(bench: Bench, folder: Path) -> Came:
    hang_up(bench, folder / "run", signal.SIGHUP)
    return Came("left a checkpoint of the last step, exit 129", "nothing")


@fault("35", "SIGHUP, SIGUSR2, SIGXCPU, repeatedly; before the first step; under nohup; SIGQUIT")
def hangups(bench: Bench, folder: Path) -> Came:
    for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU):
        run = folder / number.name
        hang_up(bench, run, number)
        bench.resume(folder, run, *sets(max_steps=last_step(run) + 1)).wait().expect(0)
        early = folder / f"early-{number.name}"
        bench.train(folder, early, hook=in_start(number)).wait().expect(128 + number, "before the first step")
        bench.resume(folder, early).wait().expect(0)
        bench.expect_straight(early)
    ignoring = in_start(signal.SIGHUP, ignored=True)
    bench.train(folder, "nohup", hook=ignoring).wait().expect(0)
    bench.expect_straight(folder / "nohup")
    process = bench.train(folder, "quit", *LONG)
    process.until(lambda: checkpoints(folder / "quit"))
    process.send(signal.SIGQUIT)
    check(process.wait().code == -signal.SIGQUIT, "SIGQUIT did not end it")
    expect_whole(folder / "quit")
    return Came(
        "each left a checkpoint of the last step, exit 129, 140, 152, however often it came; before the first step the "
        "same codes and nothing to save; ignored under nohup; SIGQUIT ends the run at once",
        "SIGQUIT: the steps since the last checkpoint",
    )


def slow_steps() -> None:
    """Each step takes a moment longer, so that signals reach the same one."""
    from ultrazoo.train.loop import Trainer

    take = Trainer.step

    def slowly(self: Any) -> None:
        time.sleep(0.1)
        take(self)

    Trainer.step = slowly  # type: ignore[method-assign]


def in_start(number: signal.Signals, *, ignored: bool = False) -> Hook:
    """The process gets a signal while it builds its data."""

    def plant() -> None:
        from ultrazoo.train import run

        real = run.build_data
        if ignored:
            signal.signal(number, signal.SIG_IGN)

        def build(*arguments: Any) -> Any:
            os.kill(os.getpid(), number)
            return real(*arguments)

        run.build_data = build

    return plant


@fault("36", "results into a pipe whose reader goes away, or onto a full disk")
def results_cut(bench: Bench, folder: Path) -> Came:
    (folder / "lines.txt").write_text("the king of the sea\n" * 4000)
    words = ("encode", bench.straight, "--file", folder / "lines.txt", "--device", "cpu")
    process, reader = into_pipe(lambda hook: cli(folder, *words, hook=hook))
    os.read(reader, 100)
    os.close(reader)
    code = process.wait().code
    check(code == 128 + signal.SIGPIPE, f"exit code {code}")
    full = os.open("/dev/full", os.O_WRONLY)
    few = ("encode", bench.straight, "the king", "--device", "cpu")
    cli(folder, *few, hook=lambda: os.dup2(full, 1)).wait().expect(1, "standard output: cannot be written: No space")
    os.close(full)
    return Came("the reader gone: exit 141 at once, without a message; a full disk: exit 1 with the reason", "nothing")
