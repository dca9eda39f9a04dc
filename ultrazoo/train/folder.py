"""The run folder: one trainer at a time, its config, environment, tokenizer, metrics and checkpoints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.train.durable import MANIFEST, place_aside, read_json, remove_leftovers, write_text
from ultrazoo.train.formats import Starts

ENVIRONMENT = "env.json"


class RunFolder:
    """While entered, a folder that this process alone trains in.

    The lock is the operating system's, on the file ``.lock`` that names the process: it goes with the process, however
    that ends, so nothing stale is ever left.

    Args:
        path: The folder; made if it is not there.

    Raises:
        ConfigError: On entering: the place cannot be written, is a checkpoint or a flight record, or another process
            trains in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        if (self.path / MANIFEST).exists():
            raise ConfigError(
                f"training.output_dir: {self.path} is a checkpoint or a flight record, expected a run folder, "
                "such as the one above; to branch off from a checkpoint: ultrazoo train CONFIG --resume CHECKPOINT "
                "--output-dir NEW"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"training.output_dir: {self.path} cannot be used as a run folder: {error}; choose another with "
                "--output-dir"
            ) from error
        if not _take(self._lock):
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ConfigError(
                f"training.output_dir: {self.path} is in use by another trainer (process {owner}); "
                "wait for it, end it, or choose another with --output-dir"
            )
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        remove_leftovers(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """File of the metrics."""
        return self.path / "metrics.jsonl"

    def mend(self, say: Callable[[str], None]) -> None:
        """Put a damaged env.json aside, with a warning, so that it keeps no run from going on."""
        path = self.path / ENVIRONMENT
        try:
            self.listed()
        except CheckpointError as error:
            say(f"warning: {error}; set aside as {path.rename(place_aside(path)).name}")

    def describe(self, config_yaml: str, tokenizer_json: str, start: dict[str, Any]) -> None:
        """Write config.yaml and tokenizer.json, and add this start to those listed in env.json."""
        write_text(self.path / "config.yaml", config_yaml)
        write_text(self.path / "tokenizer.json", tokenizer_json)
        write_text(self.path / ENVIRONMENT, json.dumps({"starts": [*self.listed(), start]}, indent=2) + "\n")

    def starts(self) -> list[dict[str, Any]]:
        """Return the starts of env.json that the run is made of, those left out that a later one began before."""
        kept: list[dict[str, Any]] = []
        for start in self.listed():
            while kept and kept[-1]["step"] >= start["step"]:
                kept.pop()
            kept.append(start)
        return kept

    def first_weights(self) -> str | None:
        """Return the checkpoint whose weights the run began with, if it did not begin with random ones."""
        starts = self.starts()
        return starts[0].get("weights_from") if starts and starts[0]["step"] == 0 else None

    def listed(self) -> list[dict[str, Any]]:
        """Return every start of env.json, in the order of time.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = self.path / ENVIRONMENT
        if not path.is_file():
            return []
        cure = "the checkpoints are valid without it, and a resume continues"
        return list(read_json(path, Starts, cure)["starts"])


def _take(file: IO[str]) -> bool:
    """Lock a file for this process without waiting; False if another has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # lockf, not flock: data workers that outlive a killed trainer for a moment do not inherit it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
