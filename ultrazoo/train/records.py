"""metrics.jsonl read again: which records a checkpoint stands behind, and which lines are no records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrazoo.train.checkpoint import read_state
from ultrazoo.train.durable import move_aside, place_aside, write_bytes

Record = dict[str, Any]
Say = Callable[[str], None]


def mark_of(count: int, last: bytes) -> dict[str, Any]:
    """What a checkpoint keeps of the records written before it: their number, and the SHA-256 of the last line."""
    return {"count": count, "last": hashlib.sha256(last).hexdigest() if count else None}


def read_lines(path: Path) -> list[bytes]:
    """The lines of metrics.jsonl, damaged ones included, empty ones left out; none where it is no file."""
    return [line for line in path.read_bytes().splitlines() if line] if path.is_file() else []


def parse_record(line: bytes) -> Record | None:
    """The record of a line; None if it is damaged."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def parse_records(lines: Iterable[bytes], path: Path, say: Say) -> list[tuple[bytes, Record]]:
    """Lines that hold a record, each with it; one warning counts the others.

    Args:
        lines: Lines of metrics.jsonl.
        path: The file, for the warning.
        say: Takes the warning.
    """
    read = [(line, parse_record(line)) for line in lines]
    whole = [(line, record) for line, record in read if record is not None]
    if damaged := len(read) - len(whole):
        say(f"warning: {path}: {damaged} damaged line{'s' * (damaged > 1)} left out; the other records are used")
    return whole


def lines_behind(lines: Sequence[bytes], state: Mapping[str, Any], path: Path, say: Say) -> list[bytes]:
    """Lines that were written before a checkpoint.

    Steps repeat in the records after a rollback, so the checkpoint's own count of them decides. Where it has none, as
    one of an earlier version, or its last record is lost, the lines of no later step are taken.

    Args:
        lines: Lines of metrics.jsonl.
        state: state.json of the checkpoint.
        path: The file, for the warning.
        say: Takes a warning if the last record is lost.
    """
    mark, step = state.get("records"), state["step"]
    if not lines or (mark is not None and mark["count"] == 0):
        return []
    if mark is not None:
        if places := _places(lines, mark):  # more than one are equal lines; damaged ones left out move all that follow
            return list(lines[: min(places, key=lambda place: abs(place - mark["count"]))])
        say(f"warning: {path}: lacks the last record before checkpoint {step}; those of no later step are taken")
    return [line for line in lines if (record := parse_record(line)) is None or record["step"] <= step]


def _places(lines: Sequence[bytes], mark: Mapping[str, Any]) -> list[int]:
    """Numbers of the lines, from 1, that the mark of a checkpoint may mean."""
    return [place for place, line in enumerate(lines, start=1) if mark_of(place, line)["last"] == mark["last"]]


def set_aside(path: Path) -> Path | None:
    """Rename the metrics of an earlier run that left no checkpoint, so that nothing is overwritten."""
    if not path.is_file() or path.stat().st_size == 0:
        return None
    return move_aside(path)


def take_over(checkpoint: Path, target: Path, say: Say) -> list[Record]:
    """Begin the metrics of a run with those that led to the checkpoint it continues from, and return them.

    They lie beside the folder ``checkpoints`` that holds it; where there are none, it is a copy put elsewhere, and
    those in the place are taken if its last record is among them. Metrics of another run there are copied aside; then
    the file is replaced in one piece.

    Args:
        checkpoint: The checkpoint.
        target: metrics.jsonl of the run.
        say: Takes lines for the user.
    """
    home, state = checkpoint.resolve().parent, read_state(checkpoint)
    beside, mark = home.parent / target.name, state.get("records")
    source = beside if home.name == "checkpoints" and beside.is_file() else target
    lines, foreign = read_lines(source), source.resolve() != target.resolve()
    if source == target and home != target.resolve().parent / "checkpoints" and mark is not None:
        foreign = not _places(lines, mark)
        lines = [] if foreign else lines
    kept = parse_records(lines_behind(lines, state, source, say), source, say)
    if foreign and target.is_file() and (others := target.read_bytes()):
        write_bytes(aside := place_aside(target), others)
        say(f"metrics of another run are kept as {aside}")
    write_bytes(target, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]
