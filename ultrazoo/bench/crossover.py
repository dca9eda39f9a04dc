"""Lines over the length, and where they cross."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ultrazoo.bench.ops import LENGTH
from ultrazoo.bench.records import Row

ROWS = re.compile(r"\bB\d+\b")


@dataclass(frozen=True)
class Panel:
    """The rows of one thing at several lengths, by backend."""

    title: str
    lines: dict[str, list[Row]]

    @property
    def first(self) -> str:
        """The backend that the others are held to: the first that was measured."""
        return next(iter(self.lines))


@dataclass(frozen=True)
class Crossing:
    """From which length on a backend is the faster one.

    ``length`` is interpolated between the two lengths measured around it; None where the lines do not cross.
    """

    fast: str
    slow: str
    length: float | None
    shortest: int
    longest: int

    def __str__(self) -> str:
        if self.length is None:
            return f"{self.fast} is faster than {self.slow} at every length from {self.shortest} to {self.longest}"
        return f"{self.fast} is faster than {self.slow} from about L = {self.length:.0f} to {self.longest} at least"


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Group rows into panels, one for each thing and kind of sample that was measured at two lengths or more."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row.length is not None:
            found.setdefault((row.name, _family(row), row.direction), {}).setdefault(row.backend, []).append(row)
    several = {
        key: {backend: sorted(line, key=lambda row: row.length or 0) for backend, line in lines.items()}
        for key, lines in found.items()
        if len({row.length for line in lines.values() for row in line}) > 1
    }
    return [Panel(f"{name}: {family}, {direction}", lines) for (name, family, direction), lines in several.items()]


def _family(row: Row) -> str:
    """The sample without its length, and without its rows, which may follow from that."""
    return " ".join(ROWS.sub("", LENGTH.sub("", row.sample)).split())


def crossing(first: Sequence[Row], second: Sequence[Row]) -> Crossing | None:
    """Find the last length at which two lines change places, by the time per token on log axes.

    Returns:
        None where they have fewer than two lengths in common, or touch.
    """
    other = {row.length: row for row in second}
    pairs = [(row, other[row.length]) for row in first if row.length in other]
    if len(pairs) < 2:
        return None
    lengths = [float(row.length or 0) for row, _ in pairs]
    gaps = [math.log(_per_token(a) / _per_token(b)) for a, b in pairs]  # below 0 where first is faster
    if gaps[-1] == 0:
        return None
    fast, slow = (pairs[0][0].backend, pairs[0][1].backend)[:: 1 if gaps[-1] < 0 else -1]
    changed = [i for i in range(len(gaps) - 1) if gaps[i] * gaps[-1] <= 0]
    length = None
    if changed:
        i = changed[-1]
        share = gaps[i] / (gaps[i] - gaps[i + 1])
        length = math.exp(math.log(lengths[i]) * (1 - share) + math.log(lengths[i + 1]) * share)
    return Crossing(fast, slow, length, int(lengths[0]), int(lengths[-1]))


def crossings(panel: Panel) -> list[Crossing]:
    """Where the first line of a panel crosses each other one, the reference apart."""
    others = [name for name in panel.lines if name not in (panel.first, "reference")]
    found = (crossing(panel.lines[panel.first], panel.lines[name]) for name in others)
    return [one for one in found if one is not None]


def _per_token(row: Row) -> float:
    return row.median_s / row.tokens
