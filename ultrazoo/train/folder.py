"""The run folder: one trainer at a time, its config, environment, tokenizer, metrics and checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.train.durable import (
    MANIFEST,
    move_aside,
    odd_kind,
    open_own,
    read_json,
    remove_leftovers,
    sha256,
    write_text,
)
from ultrazoo.train.formats import Manifest, Starts

LOCK, ENVIRONMENT, CONFIG, TOKENIZER, METRICS = ".lock", "env.json", "config.yaml", "tokenizer.json", "metrics.jsonl"
CHECKPOINTS, FLIGHT, TENSORBOARD = "checkpoints", "flight", "tensorboard"
FILES, FOLDERS = (ENVIRONMENT, CONFIG, TOKENIZER, METRICS), (FLIGHT, TENSORBOARD)


class RunFolder:
    """While entered, a folder that this process alone trains in.

    The lock is the operating system's, on the file ``.lock`` that names the process; it is released when the process
    exits. The folder itself may be a link. Inside it no link is followed for writing or deleting, and no file is
    replaced that a run did not write.

    Args:
        path: The folder; made if it is not there.

    Raises:
        ConfigError: On entering: the place cannot be written, is a checkpoint or a flight record, has a link in the
            place of its lock or its checkpoints, or another process trains in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> RunFolder:
        if (self.path / MANIFEST).exists():
            raise ConfigError(
                f"training.output_dir: {self.path} is a checkpoint or a flight record, expected a run folder, "
                "such as the one above; to branch off from a checkpoint: ultrazoo train CONFIG --resume CHECKPOINT "
                "--output-dir NEW"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_odd(self.checkpoints, folder=True)
            self._refuse_odd(self.path / LOCK)
            self._lock = os.fdopen(open_own(self.path / LOCK, os.O_RDWR | os.O_CREAT), "r+b")
        except OSError as error:
            raise ConfigError(
                f"training.output_dir: {self.path} cannot be used as a run folder: {error}; choose another with "
                "--output-dir"
            ) from error
        taken, owner = _take(self._lock), self._lock.read(64).strip().decode(errors="replace")
        if not taken or (owner and not owner.isdigit()):
            self._lock.close()
            if taken:
                raise ConfigError(
                    f"training.output_dir: {self.path / LOCK} was not written by ultrazoo; remove it, or choose "
                    "another run folder with --output-dir"
                )
            raise ConfigError(
                f"training.output_dir: {self.path} is in use by another trainer (process {owner or 'unknown'}); "
                "wait for it, end it, or choose another with --output-dir"
            )
        self._lock.seek(0)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n".encode())
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
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """File of the metrics."""
        return self.path / METRICS

    def claim(self, config_yaml: str, tokenizer: str | None, say: Callable[[str], None]) -> None:
        """Make sure that a run may write here.

        In the folder of a run, links, pipes and folders in the place of files, and a damaged env.json, are moved aside
        with a warning. In any other folder, the user's own files are left alone.

        Args:
            config_yaml: The config.yaml that will be written.
            tokenizer: The tokenizer file that the run uses, if one is given.
            say: Takes lines for the user.

        Raises:
            ConfigError: The folder is not that of a run, and has a config.yaml or tokenizer.json.
        """
        if not self._is_run():
            self._refuse_foreign(config_yaml, tokenizer)
        for name in (*FILES, *FOLDERS):
            path = self.path / name
            if kind := odd_kind(path, folder=name in FOLDERS):
                wanted = "a folder" if name in FOLDERS else "a file"
                say(f"warning: {path}: got {kind}, expected {wanted}; moved aside as {move_aside(path).name}")
        path = self.path / ENVIRONMENT
        try:
            self.listed()
        except CheckpointError as error:
            say(f"warning: {error}; set aside as {move_aside(path).name}")

    def describe(
        self, config_yaml: str, tokenizer_json: str, start: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """Add this start to those listed in env.json, and write config.yaml and tokenizer.json.

        env.json has their SHA-256 sums. A file that is there and that no start has written, such as a config.yaml that
        the user has changed, is moved aside.
        """
        texts = {CONFIG: config_yaml, TOKENIZER: tokenizer_json}
        sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        known = {name: self._sums(name) for name in texts}
        starts = [*self.listed(), {**start, "files": sums}]
        write_text(self.path / ENVIRONMENT, json.dumps({"starts": starts}, indent=2) + "\n")
        for name, text in texts.items():
            path = self.path / name
            found = sha256(path) if path.exists() else None
            if found == sums[name]:
                continue
            if found is not None and found not in known[name]:
                say(f"{path}: not as this run wrote it; kept as {move_aside(path).name}")
            write_text(path, text)

    def _is_run(self) -> bool:
        """Return whether a run has been here."""
        try:
            started = bool(self.listed())
        except CheckpointError:
            started = False
        return started or any(self.checkpoints.glob(f"step-*/{MANIFEST}"))

    def _refuse_odd(self, path: Path, *, folder: bool = False) -> None:
        if kind := odd_kind(path, folder=folder):
            raise ConfigError(
                f"training.output_dir: {path} is {kind}, expected a {'folder' if folder else 'file'} of the run, which "
                "writes and deletes nothing outside its own folder; remove it, or choose another run folder with "
                "--output-dir (which may itself be a link)"
            )

    def _refuse_foreign(self, config_yaml: str, tokenizer: str | None) -> None:
        foreign = []
        config, own_tokenizer = self.path / CONFIG, self.path / TOKENIZER
        if os.path.lexists(config) and not (config.is_file() and config.read_bytes() == config_yaml.encode()):
            foreign.append(CONFIG)
        used = tokenizer is not None and Path(tokenizer).expanduser().resolve() == own_tokenizer.resolve()
        if os.path.lexists(own_tokenizer) and not used:
            foreign.append(TOKENIZER)
        if foreign:
            raise ConfigError(
                f"training.output_dir: {self.path} has {' and '.join(foreign)} that no run wrote and that this run "
                "would replace; choose another run folder with --output-dir, or move them away"
            )

    def _sums(self, name: str) -> set[str]:
        """Return the SHA-256 sums of all that the run has written under a name, by env.json and its checkpoints."""
        sums = {start.get("files", {}).get(name) for start in self.listed()}
        for path in self.checkpoints.glob(f"step-*/{MANIFEST}"):
            with suppress(CheckpointError, KeyError, TypeError):
                sums.add(read_json(path, Manifest)["files"][name]["sha256"])
        return {entry for entry in sums if isinstance(entry, str)}

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


def _take(file: IO[bytes]) -> bool:
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
