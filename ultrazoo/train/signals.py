"""Signals become requests that the training loop polls: finish the step, write a checkpoint, then stop or continue.

| signal | in the loop |
| --- | --- |
| SIGINT, SIGTERM | stop; the second one ends the process at once |
| SIGHUP, SIGUSR2, SIGXCPU | stop; these may come repeatedly, from the terminal, a scheduler or the kernel |
| SIGUSR1 | checkpoint |
| SIGQUIT | not handled: the process ends at once |
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ultrazoo import output
from ultrazoo.errors import UltrazooError

DIRECT = (signal.SIGINT, signal.SIGTERM)
STOPS: tuple[signal.Signals, ...] = (
    *DIRECT,
    *(signal.Signals[name] for name in ("SIGHUP", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)),
)
"""Signals that stop a run after a checkpoint."""
CHECKPOINT_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
SHOW_CURSOR = "\x1b[?25h"


class StoppedError(UltrazooError):
    """A signal ended the run after its checkpoint; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class EarlyStop(BaseException):
    """A signal asked for a stop before the loop polls; not an ``Exception``, which libraries catch."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    output.notify("\nSIGUSR1: no step is taken yet; nothing to save\n")


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """Answer SIGUSR1 with a line in the body, where its default would end the process: there is no step yet."""
    if CHECKPOINT_SIGNAL is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(CHECKPOINT_SIGNAL, _nothing_to_save)
    try:
        yield
    finally:
        signal.signal(CHECKPOINT_SIGNAL, before)


class SignalGuard:
    """While entered, the signals of ``STOPS`` ask for a stop, and SIGUSR1 for a checkpoint.

    A second SIGINT or SIGTERM ends the process at once; a checkpoint that is being written is then left unfinished
    under its temporary name and never taken for a valid one. A signal other than these two that is ignored on entering,
    such as SIGHUP under ``nohup``, stays ignored. Outside the main thread, where Python allows no signal handlers,
    nothing is installed.

    Args:
        starting: Until ``begin``, there is nothing to save: a stop raises ``EarlyStop``, which becomes a
            ``StoppedError``.
    """

    early: tuple[signal.Signals, ...] = STOPS
    """Signals that are handled before ``begin``."""
    echo_seconds = 0.0
    """A second SIGINT or SIGTERM within so many seconds is the same request."""

    def __init__(self, *, starting: bool = False) -> None:
        self.stop: signal.Signals | None = None
        self.checkpoint = False
        self.polled = not starting
        self._direct_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalGuard:
        self._install(self.early, self._ask_to_stop)
        if CHECKPOINT_SIGNAL is not None:
            self._install((CHECKPOINT_SIGNAL,), self._ask_for_checkpoint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if isinstance(error, EarlyStop):
            raise StoppedError(
                error.number,
                f"{error.number.name}: stopped before the first step of this start; no new checkpoint; run the same "
                "command again",
            ) from None

    def begin(self) -> None:
        """From here on the loop polls."""
        self.polled = True
        if self._before:  # entered
            self._install(STOPS, self._ask_to_stop)
        if self.stop is not None:  # a library caught the exception
            raise EarlyStop(self.stop)

    def poll(self) -> bool:
        """Return whether the run must stop; where many processes train, all get the same answer."""
        return self.stop is not None

    def take_checkpoint_request(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        asked, self.checkpoint = self.checkpoint, False
        return asked

    def _install(self, numbers: tuple[signal.Signals, ...], handler: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            before = signal.getsignal(number)
            # None: a handler that Python could not put back
            if number in self._before or before is None or (before is signal.SIG_IGN and number not in DIRECT):
                continue
            self._before[number] = signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        asked = signal.Signals(number)
        if self._is_second(asked):
            self._end(asked)
        output.stop_waiting()
        self._request(asked)
        if not self.polled:
            raise EarlyStop(asked)

    def _is_second(self, asked: signal.Signals) -> bool:
        if asked not in DIRECT:
            return False
        first, now = self._direct_at, time.monotonic()
        if first is None:
            self._direct_at = now
        return first is not None and now - first >= self.echo_seconds

    def _end(self, asked: signal.Signals) -> None:
        cursor = SHOW_CURSOR if sys.stderr is not None and sys.stderr.isatty() else ""
        output.notify(f"{cursor}\nstopped at once; the last complete checkpoint is kept\n")
        os._exit(128 + asked)

    def _request(self, asked: signal.Signals) -> None:
        if self.stop is None:
            self.stop = asked
            if self.polled:
                end = "; once more to stop at once" if asked in DIRECT else ""
                output.notify(f"\n{asked.name}: finishing the step, then a checkpoint{end}\n")

    def _ask_for_checkpoint(self, number: int, frame: FrameType | None) -> None:
        if self.polled:
            self._request_checkpoint()
        else:
            _nothing_to_save(number, frame)

    def _request_checkpoint(self) -> None:
        self.checkpoint = True
