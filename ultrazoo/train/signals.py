"""Signals become requests that the loops poll: finish the step, write a checkpoint, then stop or go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ultrazoo.errors import UltrazooError

CHECKPOINT_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
SHOW_CURSOR = b"\x1b[?25h"


class StoppedError(UltrazooError):
    """A signal ended the run after its checkpoint; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """Answer SIGUSR1 with a line in the body, where its default would end the process: there is no step yet."""
    if CHECKPOINT_SIGNAL is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\nSIGUSR1: no step is taken yet; nothing to save\n")

    before = signal.signal(CHECKPOINT_SIGNAL, answer)
    try:
        yield
    finally:
        signal.signal(CHECKPOINT_SIGNAL, before)


class SignalGuard:
    """While entered, SIGINT and SIGTERM ask for a stop, and SIGUSR1 for a checkpoint.

    A second SIGINT or SIGTERM ends the process at once; a checkpoint that is being written is then left unfinished
    under its temporary name and never taken for a whole one. Outside the main thread, where Python allows no signal
    handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.checkpoint = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask_to_stop)
            if CHECKPOINT_SIGNAL is not None:
                self._before[CHECKPOINT_SIGNAL] = signal.signal(CHECKPOINT_SIGNAL, self._ask_for_checkpoint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def poll(self) -> bool:
        """Return whether the run must stop; where many processes train, all get the same answer."""
        return self.stop is not None

    def take_checkpoint_request(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        asked, self.checkpoint = self.checkpoint, False
        return asked

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)
            os.write(2, b"\nstopped at once; the last complete checkpoint is kept\n")
            os._exit(128 + number)
        self.stop = signal.Signals(number)
        # os.write: a handler may interrupt a print to the very same stream
        os.write(2, f"\n{self.stop.name}: finishing the step, then a checkpoint; once more to stop at once\n".encode())

    def _ask_for_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.checkpoint = True
