"""What a run records, and metrics.jsonl, where it always goes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from ultrazoo.errors import UltrazooError
from ultrazoo.train.durable import flush, open_own
from ultrazoo.train.records import mark_of, read_lines


class Reporter(Protocol):
    """Takes one record at a time: ``step`` and values, nested by name."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def sync(self) -> dict[str, Any]:
        """Wait until what was written is on the disk; return what the state of a checkpoint says of it."""
        ...

    def close(self) -> None: ...


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell with the path and a hint if the file system refuses in the body.

    Raises:
        UltrazooError: It did, for example because it is full.
    """
    try:
        yield
    except OSError as error:
        raise UltrazooError(
            f"{path}: cannot be written: {error}; the checkpoints are intact: free some space, then continue "
            "with --resume auto"
        ) from error


class JsonLines:
    """metrics.jsonl: one JSON object a line, appended and flushed; numbers that are not finite become null.

    Args:
        path: The file; what it holds is of the same run.

    Raises:
        UltrazooError: The file system refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            before = read_lines(path)
            self._count, self._last = len(before), before[-1] if before else b""
            self._file = os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            UltrazooError: The file system refused, for example because it is full.
        """
        line = json.dumps(_finite(record), allow_nan=False).encode()
        with writing(self._path):
            self._file.write(line + b"\n")
            self._file.flush()
        self._count, self._last = self._count + 1, line

    def sync(self) -> dict[str, Any]:
        """Wait until the records are on the disk; return the mark by which a resume finds the last of them.

        Raises:
            UltrazooError: The file system refused.
        """
        with writing(self._path):
            os.fsync(self._file.fileno())
            flush(self._path.parent)
        return {"records": mark_of(self._count, self._last)}

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a write that failed, and was told
            self._file.close()


class Window:
    """Sums of the steps since the last record, left on the device until they are asked for."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        """Nats per target of each step with a target in the newest means, NaN and infinities included."""
        self._done: list[dict[str, float]] = []
        self._pending: list[dict[str, torch.Tensor]] = []

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the scalars of one step."""
        self._pending.append(values)

    def _collect(self) -> None:
        """Fetch what is pending, in one transfer."""
        if self._pending:
            numbers = iter(torch.stack([value for step in self._pending for value in step.values()]).tolist())
            self._done += [{name: next(numbers) for name in step} for step in self._pending]
            self._pending = []

    def means(self) -> dict[str, float]:
        """Return the means over the steps and start anew: ``loss_sum`` / ``targets`` as ``loss``, others by step.

        Steps with a value that is not finite are left out: their update is held back too. If none is left, or none of
        them has a target, the loss is NaN.
        """
        self._collect()
        taken, self._done = self._done, []
        self.losses = [step["loss_sum"] / step["targets"] for step in taken if step["targets"]]
        steps = [step for step in taken if all(map(math.isfinite, step.values()))]
        if not steps:
            return {"loss": math.nan}
        targets = math.fsum(step["targets"] for step in steps)
        means = {"loss": math.fsum(step["loss_sum"] for step in steps) / targets if targets else math.nan}
        for name in steps[-1]:
            if name not in ("loss_sum", "targets"):
                values = [step[name] for step in steps if name in step]
                means[name] = math.fsum(values) / len(values)
        return means

    def state_dict(self) -> list[dict[str, float | None]]:
        """JSON values of the steps so far, for a checkpoint between two records; None stands for what is not finite."""
        self._collect()
        return _finite(self._done)

    def load_state_dict(self, state: list[dict[str, float | None]]) -> None:
        """Continue from the steps of a checkpoint."""
        steps = [{name: math.nan if value is None else value for name, value in step.items()} for step in state]
        self._done, self._pending = steps, []


def plain(stats: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Fetch statistics as numbers and lists of numbers."""
    return {name: value.detach().float().tolist() for name, value in stats.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
