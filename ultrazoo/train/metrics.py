"""What a run records: metrics.jsonl always, TensorBoard when asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from ultrazoo.errors import ConfigError, UltrazooError
from ultrazoo.train.durable import write_text


class Reporter(Protocol):
    """Takes one record at a time: ``step`` and values, nested by name."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one JSON object a line, appended and flushed; numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            UltrazooError: The file system refused, for example because it is full.
        """
        try:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UltrazooError(
                f"{self._path}: cannot be written: {error}; the checkpoints are intact: free some space, then continue "
                "with --resume auto"
            ) from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a write that failed, and was told
            self._file.close()


def take_over(checkpoint: Path, target: Path, step: int) -> Path | None:
    """Begin the metrics of a run with those that led to the checkpoint it continues from.

    They lie beside the folder ``checkpoints`` that holds it; where there are none, it is a copy put elsewhere, and the
    run's own are taken.

    Returns:
        Where the metrics of another run that were in the place are kept now.
    """
    home = checkpoint.resolve().parent
    source = home.parent / target.name
    if home.name != "checkpoints" or not source.is_file():
        source = target
    aside = None if source.resolve() == target.resolve() else set_aside(target)
    keep_until(source, target, step)
    return aside


def keep_until(source: Path, target: Path, step: int) -> None:
    """Write to ``target`` the records of ``source`` up to a step, without those that a resumed run makes again.

    A last line that a kill cut short goes too.
    """
    kept = []
    if source.is_file():
        for line in source.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("step", step + 1) <= step:
                kept.append(line + "\n")
    write_text(target, "".join(kept))


def set_aside(path: Path) -> Path | None:
    """Rename the metrics of an earlier run that left no checkpoint, so that nothing is overwritten."""
    if not path.is_file() or path.stat().st_size == 0:
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def load_summary_writer() -> Callable[..., Any]:
    """Return TensorBoard's ``SummaryWriter``.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "training.report_to: got 'tensorboard', but the package is not installed; "
            "pip install tensorboard (or 'ultrazoo[tensorboard]'), or remove it from report_to"
        ) from error
    writer: Callable[..., Any] = SummaryWriter
    return writer


class TensorBoard:
    """Event files under ``<run folder>/tensorboard``.

    Args:
        folder: The run folder.
        step: Step that the run continues from; later events of an earlier attempt are hidden.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = load_summary_writer()(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one scalar for each number in the record."""
        for name, value in _flat(record):
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()


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


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _flat({str(index): item for index, item in enumerate(value)}, f"{path}/")
        elif isinstance(value, int | float):
            yield path, float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
