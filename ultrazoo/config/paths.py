"""The paths of the training section: never empty, and meant as they were meant where the run began."""

from __future__ import annotations

import glob
import json
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
LONGEST_RECORD = 4 << 20
"""Bytes of an env.json."""


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


def at_home(data: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Return the values of a config.yaml that a run wrote, with the paths that are right where its folder is now.

    A run folder may be moved or copied. A config.yaml in it, or in one of its checkpoints, belongs to that folder, so
    ``output_dir`` is that folder, and paths that led into the former one lead into it. A checkpoint outside any run
    folder has no ``output_dir``. Any other file is returned as it is.

    Args:
        data: Plain values of the file.
        path: The file.

    Returns:
        The values, and a line for the user if the folder has moved; empty if not.
    """
    training = data.get("training")
    home, sealed = _home_of(path)
    if not isinstance(training, dict) or (home is None and not sealed):
        return data, ""
    if home is None:
        return {**data, "training": {**training, "output_dir": None}}, ""
    given = training.get("output_dir")
    places = (given, *(start.get("run_dir") for start in _starts(home)))
    former = [place for place in places if isinstance(place, str) and "\0" not in place]
    elsewhere = [place for place in former if Path(place).resolve() != home.resolve()]
    moved = given in elsewhere
    values = {**training, "output_dir": str(home) if moved or given is None else given}
    for before in elsewhere:
        values |= {name: _rebased(values[name], before, home) for name in PATHS if values.get(name)}
    note = f"training.output_dir: got {given}, but {path} belongs to the run in {home}, which is used" if moved else ""
    return {**data, "training": values}, note


def _home_of(path: Path) -> tuple[Path | None, bool]:
    """Return the run folder that a config.yaml lies in, and whether it is part of a checkpoint or a flight record."""
    folder = path.absolute().parent
    if path.name != "config.yaml":
        return None, False
    if (folder / "manifest.json").is_file():
        inside = folder.parent.name in ("checkpoints", "flight") and _is_run(folder.parents[1])
        return folder.parents[1] if inside else None, True
    return folder if _is_run(folder) else None, False


def _is_run(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*/manifest.json")) or bool(_starts(folder))


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Return the starts in env.json of a run folder; none if it is damaged or not there."""
    path = folder / "env.json"
    try:
        data = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size <= LONGEST_RECORD else {}
    except (OSError, ValueError, RecursionError):
        return []
    starts = data.get("starts") if isinstance(data, dict) else None
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _rebased(value: Any, before: str, home: Path) -> Any:
    """Return a path that leads into the folder ``before`` as one into ``home``; others as they are.

    What is in the former place alone, because it was not copied, stays there.
    """
    for old in dict.fromkeys((before, glob.escape(before))):
        if isinstance(value, str) and value.startswith(f"{old}/"):
            rest = value.removeprefix(f"{old}/")
            first = Path(rest).parts[0]
            if (home / first).exists() or not Path(before, first).exists():
                pattern = old != before or glob.has_magic(rest)
                return f"{glob.escape(str(home)) if pattern else home}/{rest}"
    return value
