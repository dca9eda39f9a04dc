"""Standard output and standard error that may break: a closed pipe, a lost terminal, a full disk.

Messages are less important than the work that they report, so a message that cannot be written is dropped. Results that
cannot be written end the command.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ultrazoo.errors import UltrazooError

STDOUT, STDERR = 1, 2
PIECE = 4096
"""Bytes that a pipe which is ready takes without blocking (PIPE_BUF on Linux)."""
CHECK_MILLISECONDS = 100
CLOSED_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code when the reader of the results is gone, as a shell reports it for other programs."""

_waits = True


def stop_waiting() -> None:
    """Drop messages from now on instead of waiting for a reader that does not read; a stop was requested."""
    global _waits
    _waits = False


def notify(text: str) -> None:
    """Write text to standard error from a signal handler, at once or not at all.

    ``print`` may be interrupted by the handler in the middle of a write to the same stream.
    """
    with suppress(OSError):
        if _is_ready(STDERR, 0):
            os.write(STDERR, text.encode())


def _is_ready(number: int, milliseconds: int) -> bool:
    """Return whether a write would return at once, with an error or without."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(milliseconds))


class _Stream(io.FileIO):
    """A file descriptor that waits for a slow reader, also where another program has made it non-blocking."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        try:
            while not self.gives_up():
                if _is_ready(self.fileno(), CHECK_MILLISECONDS):
                    written = super().write(memoryview(data)[:PIECE])
                    if written is not None:
                        return written
        except OSError as error:
            self.failed(error)
        return len(data)

    def gives_up(self) -> bool:
        """Return whether to drop what a reader does not take now."""
        return False

    def failed(self, error: OSError) -> None:
        """Handle a write that failed; if this returns, the data is dropped."""


class _Messages(_Stream):
    """Drops what cannot be written."""

    def gives_up(self) -> bool:
        return not _waits and not _is_ready(self.fileno(), 0)


class _Results(_Stream):
    """Ends the command if its results cannot be written."""

    def failed(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # for what is still buffered
        os.close(null)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(CLOSED_PIPE) from None
        raise UltrazooError(
            f"standard output: cannot be written: {error.strerror}; the output is incomplete: free some space, or send "
            "it elsewhere"
        ) from error


def _replaced(stream: TextIO | None, number: int, kind: type[_Stream]) -> TextIO:
    """Return a stream of ``kind`` for a file descriptor, or the given one if it is another's, such as a notebook's."""
    if stream is not None:
        try:
            if stream.fileno() != number:
                return stream
        except (OSError, ValueError):  # no file, or closed
            return stream
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(kind(number)),
        encoding=getattr(stream, "encoding", None),
        errors="backslashreplace" if number == STDERR else getattr(stream, "errors", None),
        line_buffering=number == STDERR or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def _open_closed() -> None:
    """Open descriptors that are closed on the null device; the next file would get the number, and what is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(number, True)
    os.close(number)


def install() -> None:
    """Prepare the streams of a command: standard output takes its results, standard error its messages."""
    _open_closed()
    sys.stdout = _replaced(sys.stdout, STDOUT, _Results)
    sys.stderr = _replaced(sys.stderr, STDERR, _Messages)


@contextmanager
def only_messages() -> Iterator[None]:
    """Drop what the body cannot write to standard output and standard error."""
    global _waits
    _open_closed()
    _waits, before = True, (sys.stdout, sys.stderr)
    sys.stdout = _replaced(sys.stdout, STDOUT, _Messages)
    sys.stderr = _replaced(sys.stderr, STDERR, _Messages)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
