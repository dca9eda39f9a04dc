"""What is on the screen while kernels are compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ultrazoo.ops.compiling import Report

EVERY_SECONDS = 10.0
log = logging.getLogger("ultrazoo")


@contextmanager
def build_progress() -> Iterator[Report]:
    """Yield what takes the progress of a build: one line kept up to date on a terminal, else one every ten seconds."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    started = spoken = time.monotonic()
    status = None
    with ExitStack() as stack:

        def report(done: int, total: int) -> None:
            nonlocal status, spoken
            now = time.monotonic()
            line = f"kernels: compiled {done} of {total} files, {now - started:.0f} s"
            if done == total or not log.isEnabledFor(logging.INFO):
                stack.close()  # takes the line off the terminal
                status = None
            elif console.is_terminal:
                if status is None:
                    status = stack.enter_context(console.status(line))
                status.update(line)
            elif now - spoken >= EVERY_SECONDS:
                spoken = now
                log.info("%s", line)

        yield report
