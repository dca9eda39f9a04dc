"""Real processes of the command line, watched, signalled and waited for."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Hook = Callable[[], None]


class FaultError(Exception):
    """What had to hold did not."""


def check(holds: object, message: str) -> None:
    """Fail with a message unless it holds."""
    if not holds:
        raise FaultError(message)


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code (negative: the signal), output, error output and seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line that it said."""
        return next((line for line in reversed((self.err or self.out).strip().splitlines()) if line.strip()), "")

    def expect(self, code: int, *words: str) -> Ended:
        """Fail unless it ended with a code and said these words, and no traceback."""
        said = self.out + self.err
        check("Traceback (most recent call last)" not in said, f"a traceback: {said[-1500:]}")
        check(self.code == code, f"exit code {self.code}, expected {code}: {said[-1500:]}")
        for word in words:
            check(word in said, f"did not say {word!r}: {said[-1500:]}")
        return self


class Running:
    """A child process with its output in files."""

    def __init__(self, pid: int, stem: Path) -> None:
        self.pid, self.stem, self.begun = pid, stem, time.monotonic()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def wait(self, limit: float = 120.0) -> Ended:
        """Wait for the end; after ``limit`` seconds it is killed and that is a failure."""
        while (code := self.poll()) is None:
            if time.monotonic() - self.begun > limit:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise FaultError(f"still running after {limit:.0f} s: {self.said()[-800:]}")
            time.sleep(0.005)
        seconds = time.monotonic() - self.begun
        out, err = (self.stem.with_suffix(part).read_text(errors="replace") for part in (".out", ".err"))
        return Ended(code, out, err, seconds)

    def said(self) -> str:
        """What it has said on its error output so far."""
        path = self.stem.with_suffix(".err")
        return path.read_text(errors="replace") if path.is_file() else ""

    def until(self, condition: Callable[[], object], limit: float = 90.0) -> None:
        """Wait until something holds while the process runs."""
        begun = time.monotonic()
        while not condition():
            if self.poll() is not None:
                raise FaultError(f"ended too early: {self.said()[-800:]}")
            if time.monotonic() - begun > limit:
                self.send(signal.SIGKILL)
                raise FaultError(f"waited {limit:.0f} s in vain: {self.said()[-800:]}")
            time.sleep(0.002)


_count = 0


def fork(folder: Path, body: Callable[[], Any]) -> Running:
    """Run a function in a process of its own, its output in files of ``folder``.

    A fork saves the three seconds that importing torch takes; no thread was started before it.
    """
    global _count
    _count += 1
    stem = folder / f"process-{_count:03d}"
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Running(pid, stem)
    _become(stem, body)


def _become(stem: Path, body: Callable[[], Any]) -> NoReturn:
    code = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, suffix in ((1, ".out"), (2, ".err")):
            handle = os.open(stem.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        body()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def cli(folder: Path, *arguments: str | Path, hook: Hook | None = None) -> Running:
    """Start ``ultrazoo ARGUMENTS`` in a folder; ``hook`` plants the fault in that process first."""

    def body() -> None:
        os.chdir(folder)
        if hook is not None:
            hook()
        from ultrazoo.cli import main

        sys.argv = ["ultrazoo", *map(str, arguments)]
        main()

    return fork(folder, body)


def executed(folder: Path, *arguments: str | Path) -> Running:
    """Start ``python -m ultrazoo ARGUMENTS`` as a program of its own."""

    def body() -> None:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "ultrazoo", *map(str, arguments)])

    return fork(folder, body)
