"""Lines of progress: how far, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_SECONDS, EVERY_SECONDS = 2.0, 5.0


class Progress:
    """Counts rows and bytes of text; prints a line after the first two seconds and every five seconds from then on.

    Args:
        what: What is going on.
        total: How much there is to do, in rows or any other unit that ``add`` is told.
        console: Takes the lines.
        clock: Seconds.
    """

    def __init__(
        self, what: str, total: int, console: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.total, self.console, self.clock = what, total, console, clock
        self.rows = self.bytes = self.done = 0
        self.started = clock()
        self._next = self.started + FIRST_SECONDS

    def add(self, rows: int, size: int, done: int | None = None) -> None:
        """Count rows of ``size`` bytes of text; ``done`` is their share of the total where that is not in rows."""
        self.rows += rows
        self.bytes += size
        self.done += rows if done is None else done
        now = self.clock()
        if now >= self._next and 0 < self.done < self.total:
            self._next = now + EVERY_SECONDS
            left = (self.total - self.done) * (now - self.started) / self.done
            self.console(f"{self.what}: {self.done / self.total:.0%}, {self.rate(now)}, {duration(left)} left")

    def rate(self, now: float | None = None) -> str:
        """Return ``rows/s, MB/s`` since the start; MB/s alone where no rows are counted."""
        seconds = max((self.clock() if now is None else now) - self.started, 1e-9)
        rows = f"{self.rows / seconds:,.0f} rows/s, " if self.rows else ""
        return f"{rows}{self.bytes / 1e6 / seconds:.1f} MB/s"


def duration(seconds: float) -> str:
    """Return seconds as ``12 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
