"""The checkpoints of a run folder: which are kept, which is newest, which is best."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrazoo.errors import CheckpointError
from ultrazoo.train.checkpoint import Snapshot, read_state, verify_checkpoint, write_checkpoint
from ultrazoo.train.durable import MANIFEST, FormatVersionError, flush, remove_leftovers, write_text

FOLDER = re.compile(r"step-(\d+)")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder; 0 if it has another name."""
    match = FOLDER.fullmatch(path.name)
    return int(match[1]) if match else 0


class CheckpointStore:
    """The folder ``checkpoints/`` of one run.

    Kept are the newest ``max_rolling`` checkpoints, the ``num_best`` ones of lowest validation loss, and always the
    newest, until a newer one is complete. What is there is read from the folders themselves, so the limits hold across
    restarts; the files ``latest`` and ``best`` only name folders for people and other programs.

    Args:
        root: The folder; it is made when the first checkpoint is written.
        max_rolling: Most recent checkpoints to keep.
        num_best: Best checkpoints to keep.
    """

    def __init__(self, root: Path, max_rolling: int, num_best: int) -> None:
        self.root = root
        self.max_rolling = max_rolling
        self.num_best = num_best
        self._losses: dict[Path, float | None] = {}

    def folders(self) -> list[Path]:
        """Folders with the name of a checkpoint, oldest first, ordered by step and never by time."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if FOLDER.fullmatch(path.name)), key=step_of)

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
        self._losses.pop(folder, None)  # of one of the same step that was set aside
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
        complete, best = self.complete(), self.best()[: self.num_best]
        for name, target in (("latest", complete[-1:]), ("best", best[:1])):
            pointer = self.root / name
            if not target:
                pointer.unlink(missing_ok=True)
            elif not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != target[0].name:
                write_text(pointer, target[0].name + "\n")
        kept = {*complete[-max(self.max_rolling, 1) :], *best}
        for path in complete:
            if path not in kept:
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

    def _validation_loss(self, path: Path) -> float | None:
        """Validation loss at the checkpoint; None if it was not validated or its state cannot be read."""
        if path not in self._losses:
            try:
                state: dict[str, Any] = read_state(path)
            except CheckpointError:
                state = {}
            self._losses[path] = state.get("validation_loss")
        return self._losses[path]


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
