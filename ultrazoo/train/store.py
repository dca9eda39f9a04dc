"""The checkpoints of a run folder: which are kept, which is newest, which is best."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrazoo.errors import CheckpointError
from ultrazoo.train.checkpoint import Snapshot, read_state, verify_checkpoint, write_checkpoint
from ultrazoo.train.durable import (
    MANIFEST,
    FormatVersionError,
    flush,
    move_aside,
    odd_kind,
    remove_leftovers,
    write_text,
)

log = logging.getLogger("ultrazoo")
LONGEST_POINTER = 256
FOLDER = re.compile(r"step-(\d+)")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder; 0 if it has another name."""
    match = FOLDER.fullmatch(path.name)
    return int(match[1]) if match else 0


class CheckpointStore:
    """The folder ``checkpoints/`` of one run.

    Kept are the newest ``max_rolling`` checkpoints, the ``num_best`` ones of lowest validation loss, and always the
    newest, until a newer one is complete. What is there is read from the folders themselves, so the limits hold across
    restarts; the files ``latest`` and ``best`` only name folders for people and other programs. Links are none of the
    run's checkpoints: they are not followed, and moved aside if they are in the way. Checkpoints of another run, which
    someone put here, are not removed.

    Args:
        root: The folder; it is made when the first checkpoint is written.
        max_rolling: Most recent checkpoints to keep.
        num_best: Best checkpoints to keep.
    """

    def __init__(self, root: Path, max_rolling: int, num_best: int) -> None:
        self.root = root
        self.max_rolling = max_rolling
        self.num_best = num_best
        self._facts: dict[Path, dict[str, Any]] = {}

    def folders(self) -> list[Path]:
        """Folders with the name of a checkpoint, oldest first, ordered by step and never by time."""
        if not self.root.is_dir():
            return []
        named = (path for path in self.root.iterdir() if FOLDER.fullmatch(path.name) and not path.is_symlink())
        return sorted(named, key=step_of)

    def complete(self) -> list[Path]:
        """Checkpoints that have a manifest, oldest first."""
        return [path for path in self.folders() if (path / MANIFEST).is_file()]

    def best(self) -> list[Path]:
        """Checkpoints that were validated, lowest loss first; the earlier one where two are equal."""
        losses = {path: loss for path in self.complete() if (loss := self._validation_loss(path)) is not None}
        return sorted(losses, key=lambda path: losses[path])

    def would_be_best(self, validation_loss: float) -> bool:
        """True if a checkpoint of this loss would be kept among the best."""
        if self.num_best == 0 or not math.isfinite(validation_loss):
            return False
        kept = self.best()[: self.num_best]
        worst = self._validation_loss(kept[-1]) if len(kept) == self.num_best else None
        return worst is None or validation_loss < worst

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write a checkpoint, then point to it, then remove what is no longer kept.

        Raises:
            CheckpointError: The file system refused, or a checkpoint of this step is already there.
        """
        folder = self.root / f"step-{step:06d}"
        if folder.is_symlink():
            _move_link(folder)
        if folder.exists():
            raise CheckpointError(
                f"{folder}: is already there; continue with --resume auto, or use another --output-dir"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.root}: cannot be made: {error}; choose another training.output_dir"
            ) from error
        write_checkpoint(folder, snapshot)
        self._facts.pop(folder, None)  # of a damaged one of the same step
        try:
            self.tidy()
        except OSError as error:
            raise CheckpointError(
                f"{self.root}: {folder.name} is complete, but the older ones cannot be tidied up: {error}; "
                "free some space, then continue with --resume auto"
            ) from error
        return folder

    def tidy(self) -> None:
        """Point ``latest`` and ``best`` to what is there, and remove leftovers and what is no longer kept."""
        if not self.root.is_dir():
            return
        remove_leftovers(self.root)  # which may have the names that are needed below
        complete, best = self.complete(), self.best()[: self.num_best]
        self._point("latest", complete[-1:])
        self._point("best", best[:1])
        kept = {*complete[-max(self.max_rolling, 1) :], *best}
        own = (None, self._read(complete[-1]).get("run")) if complete else ()
        for path in complete:
            if path not in kept and self._read(path).get("run") in own:
                # renamed first: a folder that is half removed must not look like a damaged checkpoint
                path.rename(path.with_name(f".{path.name}.deleting"))
        flush(self.root)
        remove_leftovers(self.root)

    def newest_whole(self, warn: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint that its manifest confirms; None when there are no checkpoints at all.

        A damaged one is set aside under a new name, with a warning, and the one before it is tried.

        Raises:
            FormatVersionError: The newest one that is whole was written by another version.
            CheckpointError: There are checkpoints and every one is damaged.
        """
        damaged: list[str] = []
        for path in reversed(self.folders()):
            try:
                verify_checkpoint(path)
            except FormatVersionError:
                raise
            except CheckpointError as error:
                aside = _free_name(path.with_name(f"{path.name}.damaged"))
                path.rename(aside)
                damaged.append(str(error))
                warn(f"warning: {error}; set aside as {aside.name}")
            else:
                return path
        if damaged:
            raise CheckpointError(
                f"{self.root}: no whole checkpoint is left ({len(damaged)} damaged); "
                "start again with another --output-dir, or restore one"
            )
        return None

    def _point(self, name: str, target: list[Path]) -> None:
        """Let a pointer name a checkpoint, or remove it; what the run did not write under its name is moved aside."""
        pointer, text = self.root / name, f"{target[0].name}\n" if target else None
        found = None
        if os.path.lexists(pointer):
            found = None if odd_kind(pointer) else _text_of(pointer)
            if found is None or not (FOLDER.fullmatch(found.strip()) or not found.strip()):
                log.warning("%s: was not written by this run; kept as %s", pointer, move_aside(pointer).name)
                found = None
        if text is not None and found != text:
            write_text(pointer, text)
        elif text is None and found is not None:
            pointer.unlink()

    def _validation_loss(self, path: Path) -> float | None:
        """Validation loss at the checkpoint; None if it was not validated or its state cannot be read."""
        return self._read(path).get("validation_loss")

    def _read(self, path: Path) -> dict[str, Any]:
        """Validation loss and run of a checkpoint; empty if its state cannot be read."""
        if path not in self._facts:
            try:
                state: dict[str, Any] = read_state(path)
            except CheckpointError:
                state = {}
            self._facts[path] = {name: state[name] for name in ("validation_loss", "run") if name in state}
        return self._facts[path]


def read_pointer(root: Path, name: str) -> Path | None:
    """Return the checkpoint that the file ``latest`` or ``best`` in a folder of checkpoints names; None without one.

    Raises:
        CheckpointError: It names no checkpoint of this folder, or one that leads elsewhere.
    """
    pointer = root / name
    if not pointer.is_file():
        return None
    text = _text_of(pointer).strip()
    target = root / text
    if not FOLDER.fullmatch(text) or target.resolve().parent != root.parent.resolve() / root.name:
        raise CheckpointError(
            f"{pointer}: got {text!r}, which does not name a checkpoint inside {root.parent}; expected a name such as "
            "step-000500; name the checkpoint itself instead of its run folder"
        )
    return target


def _text_of(pointer: Path) -> str:
    with pointer.open("rb") as file:
        return file.read(LONGEST_POINTER).decode(errors="replace")


def _move_link(path: Path) -> None:
    aside = _free_name(path.with_name(f"{path.name}.link"))
    log.warning("%s: got %s, expected nothing there; moved aside as %s", path, odd_kind(path), aside.name)
    path.rename(aside)


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
