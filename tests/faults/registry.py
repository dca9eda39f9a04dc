"""The list of faults and what came of each."""

from __future__ import annotations

import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from faults.parts import Bench
from faults.process import FaultError


class Came(NamedTuple):
    """What happened, and what was lost."""

    happened: str
    lost: str


@dataclass(frozen=True)
class Fault:
    """One fault: its number in the list, what it is, how it is brought about, and whether the quick run has it."""

    number: str
    name: str
    bring: Callable[[Bench, Path], Came]
    quick: bool
    limit: float


@dataclass
class Result:
    """One row of the table."""

    number: str
    name: str
    happened: str
    lost: str
    verdict: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


FAULTS: list[Fault] = []
DISTRIBUTED = {"15": "torchrun gets SIGTERM", "16": "kill -9 of one of two ranks", "17": "abort in the teardown"}


def fault(
    number: str, name: str, *, quick: bool = False, limit: float = 240.0
) -> Callable[[Callable[[Bench, Path], Came]], Callable[[Bench, Path], Came]]:
    """Enter a function into the list."""

    def enter(bring: Callable[[Bench, Path], Came]) -> Callable[[Bench, Path], Came]:
        FAULTS.append(Fault(number, name, bring, quick, limit))
        return bring

    return enter


def bring(one: Fault, bench: Bench, folder: Path) -> Result:
    """Bring a fault about and judge."""
    begun = time.monotonic()
    try:
        came = one.bring(bench, folder)
        result = Result(one.number, one.name, came.happened, came.lost, "ok")
    except FaultError as error:
        result = Result(one.number, one.name, str(error), "?", "FAILED")
    except Exception:  # noqa: BLE001
        result = Result(one.number, one.name, traceback.format_exc(), "?", "FAILED")
    result.seconds = round(time.monotonic() - begun, 1)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result.cpu_seconds = round(sum(one.ru_utime + one.ru_stime for one in used), 1)
    return result


def as_dict(result: Result) -> dict[str, object]:
    """JSON values of a row."""
    return asdict(result)
