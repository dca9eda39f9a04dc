"""The paths of the training section: never empty, and meant as they were meant where the run began."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrazoo.config.training import TrainingConfig

PATHS = {
    "local_parquet_dir": "the embedded corpus",
    "tokenizer": "one trained from the data",
    "cache_dir": "the user's cache folder",
    "output_dir": "runs/<name of the config>",
}
"""Field -> what stands in for it when it is left out."""


def require_path(field: str, path: str | None) -> str | None:
    """Return what a field holds.

    Raises:
        ValueError: It is blank, or no system has such a path.
    """
    if path is not None and (not path.strip() or "\0" in path):
        raise ValueError(
            f"got {path!r}, expected a path; leave the field out for {PATHS[field]}, or write . for this directory"
        )
    return path


def absolute(path: str) -> str:
    """Return a path or glob that means in every working directory what the given one means in this; ~ stays."""
    if Path(path).is_absolute() or path.startswith("~"):
        return path
    here = Path.cwd()
    if glob.has_magic(path) and glob.has_magic(str(here)) and not (here / path).exists():
        here = Path(glob.escape(str(here)))
    return str(here / path)


def anchored(training: TrainingConfig) -> TrainingConfig:
    """Return the section with absolute paths."""
    given = {name: getattr(training, name) for name in PATHS}
    return training.model_copy(update={name: absolute(path) for name, path in given.items() if path is not None})


def spelled_as(training: TrainingConfig, saved: Mapping[str, Any]) -> TrainingConfig:
    """Return an anchored section in which paths that ``saved`` names otherwise, but means alike, are named as there.

    Args:
        training: The section.
        saved: Plain values of another, whose relative paths are taken from the working directory.
    """
    words = {name: saved[name] for name in PATHS if saved.get(name)}
    return training.model_copy(
        update={name: path for name, path in words.items() if absolute(path) == getattr(training, name)}
    )
