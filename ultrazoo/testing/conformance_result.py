"""What a check of the conformance kit is, and what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ultrazoo.callables import in_one_line, place_in, place_of
from ultrazoo.testing.law_kit import Check

State = Literal["passed", "failed", "not applicable", "measured"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check says of its subject, with the figure that came nearest to the limit where there is one."""

    state: State
    what: str
    measured: float | None = None
    limit: float | None = None
    at_least: bool = False
    """The limit is the least and not the most that the figure may be."""
    place: str = ""
    """``file:line`` in the plugin: where it raised an error, or else the code that is checked; empty if not known."""


@dataclass(frozen=True, kw_only=True)
class Result(Finding):
    """A finding with what it is about."""

    plugin: str
    kind: str
    """``mixer``, ``ffn``, ``norm``, ``embedding``, ``op``, ``preset`` or ``plugin``."""
    subject: str
    check: str
    seconds: float

    @property
    def figures(self) -> str:
        """Measured figure and limit as text; empty where there is none."""
        if self.measured is None:
            return ""
        if self.limit is None:
            return f"{self.measured:,.4g}"
        return f"{self.measured:,.3g} {'of at least' if self.at_least else 'of at most'} {self.limit:,.3g}"

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.subject} of plugin {self.plugin}: check {self.check!r} {self.state}", self.what]
        if self.measured is not None:
            expected = "" if self.limit is None else f", expected {'at least' if self.at_least else 'at most'} "
            lines.append(f"got {self.measured:.6g}{expected}{'' if self.limit is None else f'{self.limit:.6g}'}")
        if self.place and self.place not in self.what:
            lines.append(f"in {self.place}")
        return "\n  ".join(lines)


class ConformanceFailure(AssertionError):  # noqa: N818 - it is one, and reads as one in a traceback
    """A check failed; ``result`` has the numbers."""

    def __init__(self, result: Result) -> None:
        super().__init__(str(result))
        self.result = result


@dataclass(frozen=True, kw_only=True)
class Task:
    """One check of one subject, to be run now, later, or by pytest."""

    plugin: str
    kind: str
    subject: str
    check: str
    measure: Callable[[], Finding] = field(repr=False)
    code: Callable[..., Any] | None = field(default=None, repr=False)
    """The module or function that is checked."""

    @property
    def group(self) -> str:
        """First word of the check: what a badge stands for."""
        return self.check.partition(":")[0]

    @property
    def id(self) -> str:
        """Subject and check, as pytest names them."""
        return f"{self.subject}-{self.check}".replace("::", ".").replace(": ", "-").replace(" ", "-")

    def run(self) -> Result:
        """Measure; whatever the subject raises is its failure, and leaves nothing behind for the next task."""
        begun, threads = time.perf_counter(), torch.get_num_threads()
        try:
            with torch.random.fork_rng(devices=[]):
                found = self.measure()
        # foreign code: whatever it raises is a failure of this check alone; sys.exit() too, but not the user's Ctrl-C
        except (Exception, SystemExit) as error:  # noqa: BLE001
            place = place_in(error, self.code) if self.code else ""
            found = Finding(state="failed", what=in_one_line(error), place=place)
        finally:
            torch.set_num_threads(threads)
        if found.state == "failed" and not found.place and self.code is not None:
            found = replace(found, place=place_of(self.code))
        return Result(
            plugin=self.plugin,
            kind=self.kind,
            subject=self.subject,
            check=self.check,
            seconds=time.perf_counter() - begun,
            **vars(found),
        )

    def hold(self) -> Result:
        """Measure, for a test.

        Returns:
            What was found, unless it failed.

        Raises:
            ConformanceFailure: It failed.
        """
        __tracebackhide__ = True
        result = self.run()
        if result.state == "failed":
            raise ConformanceFailure(result)
        return result


def bounded(what: str, measured: float, limit: float, *, at_least: bool = False) -> Finding:
    """Hold a figure to a limit; NaN fails."""
    holds = measured >= limit if at_least else measured <= limit
    return Finding(state="passed" if holds else "failed", what=what, measured=measured, limit=limit, at_least=at_least)


def finding_of(check: Check) -> Finding:
    """Return the verdict on a check of a law."""
    return bounded(check.what, check.measured, check.limit, at_least=check.at_least)


def figure(what: str, measured: float | None) -> Finding:
    """State a figure that nothing is held to."""
    return Finding(state="measured", what=what, measured=measured)


def absent(why: str) -> Finding:
    """Say why a check does not apply."""
    return Finding(state="not applicable", what=why)
