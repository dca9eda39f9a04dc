"""Turns pydantic's errors into lines that say where, what was got, what was expected, and a hint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from ultrazoo.errors import did_you_mean, shortened

MOST_LINES = 20
"""Problems that are shown."""
LONGEST_LINE = 1000


class ProblemsError(ValueError):
    """Several finished error lines from one validator."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


Loc = tuple[int | str, ...]


def problems_of(
    error: ValidationError, prefix: str | Callable[[Loc], str], known: Iterable[str] | dict[str, Any]
) -> list[str]:
    """Return one line per problem, at most ``MOST_LINES`` and one that counts the others.

    Args:
        error: What pydantic found.
        prefix: Dotted path of the thing that was validated, may be empty; or a function of the place inside it.
        known: Names allowed at the level of ``prefix``, for suggestions; or a nested mapping of them.
    """
    lines: list[str] = []
    found = error.errors(include_url=False)
    for item in found[: MOST_LINES + 1]:
        if item["type"] == "too_short" and any(item["loc"] == other["loc"][:-1] for other in found):
            continue  # too short only for want of the items that are told of one by one
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ProblemsError):
            lines += cause.lines
            continue
        where = _dotted(prefix(item["loc"]) if callable(prefix) else prefix, item["loc"])
        if item["type"] == "extra_forbidden":
            names = _known_at(known, item["loc"][:-1])
            hint = did_you_mean(str(item["loc"][-1]), names)
            lines.append(f"{where}: unknown field; {hint}known: {', '.join(sorted(names)) or 'none'}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; expected a value")
        elif cause is not None:
            lines.append(f"{where}: {shortened(str(cause), LONGEST_LINE)}")
        else:
            expected = item["msg"][0].lower() + item["msg"][1:]
            got = shortened(repr(item["input"]))
            lines.append(f"{where}: got {got}; {expected.replace('input should be', 'expected')}")
    if len(lines) > MOST_LINES:
        return [*lines[:MOST_LINES], f"{max(len(lines), len(found)) - MOST_LINES:,} more problems"]
    return lines


def _dotted(prefix: str, loc: Loc) -> str:
    path = prefix
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
    return shortened(path) or "config"


def _known_at(known: Iterable[str] | dict[str, Any], loc: Loc) -> list[str]:
    level: Any = known
    for part in loc:
        level = level.get(part, {}) if isinstance(level, dict) else {}
    return [str(name) for name in level]
