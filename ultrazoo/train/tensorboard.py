"""The records of a run as TensorBoard's event files."""

from __future__ import annotations

import errno
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultrazoo.errors import ConfigError
from ultrazoo.train.durable import odd_kind
from ultrazoo.train.metrics import writing


def load_package() -> tuple[Any, Any, Callable[..., Any]]:
    """Return TensorBoard's modules of events and of summaries, and its ``RecordWriter``.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise ConfigError(
            "training.report_to: got 'tensorboard', but the package is not installed; "
            "pip install tensorboard (or 'ultrazoo[tensorboard]'), or remove it from report_to"
        ) from error
    return event_pb2, summary_pb2, RecordWriter


class TensorBoard:
    """An event file under ``<run folder>/tensorboard``, appended and flushed by the process itself, without a thread.

    Events of an earlier start from the step on are hidden, and the kept records from there on written again: some are
    of later steps than the checkpoint's where the run rolled back. So it shows what metrics.jsonl holds.

    Args:
        folder: The run folder.
        step: Step that the run continues from.
        kept: Records that led there.

    Raises:
        ConfigError: The package is not installed.
        UltrazooError: The file system refused, for example because it is full.
    """

    def __init__(self, folder: Path, step: int, kept: Sequence[Mapping[str, Any]] = ()) -> None:
        self._events, self._summaries, record_writer = load_package()
        home = folder / "tensorboard"
        with writing(home):
            if not home.is_dir():
                step = 0
            home.mkdir(exist_ok=True)
            if kind := odd_kind(home, folder=True):
                raise NotADirectoryError(errno.ENOTDIR, f"is {kind}, expected a folder", str(home))
            # TensorBoard reads files in the order of their names
            name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            self._path = home / name
            self._file = self._path.open("xb")
        self._records = record_writer(self._file)
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(file_version="brain.Event:2")
        self._add(step=step, session_log=start)
        for record in kept:
            if record["step"] >= step:
                self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one scalar for each number in the record.

        Raises:
            UltrazooError: The file system refused, for example because it is full.
        """
        value = self._summaries.Summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in _flat(record) if name != "step"]
        self._add(step=record["step"], summary=self._summaries.Summary(value=scalars))

    def sync(self) -> dict[str, Any]:
        """Wait until the file is on the disk.

        Raises:
            UltrazooError: The file system refused.
        """
        with writing(self._path):
            os.fsync(self._file.fileno())
        return {}

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a write that failed, and was told
            self._file.close()

    def _add(self, **fields: Any) -> None:
        with writing(self._path):
            self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _flat({str(index): item for index, item in enumerate(value)}, f"{path}/")
        elif value is None:  # so metrics.jsonl has what is not finite
            yield path, math.nan
        elif isinstance(value, int | float):
            yield path, float(value)
