"""Which Parquet files a location means: a file, a folder or a glob."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ultrazoo.errors import DataError

SYSTEM_FOLDERS = {"lost+found"}
"""At the top of a volume, for its administrator alone; never data."""
CORPUS = Path(__file__).resolve().with_name("corpus")
ESCAPED = re.compile(r"\[([*?[])\]")
"""A wildcard that stands for itself, as ``glob.escape`` writes it."""


def find_files(location: str | None) -> tuple[list[Path], Path]:
    """Return the Parquet files of a location in order, and the folder that their names are relative to.

    Links are followed. One that leads nowhere is returned like any file, for it cannot be read either.

    Raises:
        DataError: Nothing there, nothing that ends in .parquet, or a folder that the system does not let be read.
    """
    if location is None:
        return sorted(CORPUS.glob("*.parquet")), CORPUS
    where = f"training.local_parquet_dir: {location}"
    try:
        return _matches(Path(location).expanduser(), where)
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that nobody has
        raise DataError(f"{where}: cannot be looked up ({error}); expected a path that can be read here") from error


def _matches(path: Path, where: str) -> tuple[list[Path], Path]:
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        found = [item for item in files_below(path) if item.name.endswith(".parquet")]
        root = path
        expected = "a folder with *.parquet files"
    else:
        found = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if not Path(item).is_dir())  # noqa: PTH207
        root = Path(*_fixed_parts(path))
        expected = "a Parquet file, a folder of them or a glob such as 'texts/**/*.parquet'"
    if not found:
        state = "no Parquet file in it" if path.is_dir() else "no such file, folder or match"
        raise DataError(
            f"{where}: {state}; expected {expected}; convert .txt or .jsonl with 'ultrazoo data convert', or leave the "
            "field out to train on the embedded corpus"
        )
    return found, root


def files_below(root: Path) -> list[Path]:
    """Return what is no folder below a folder, in order of name; each folder once, however many links lead to it.

    Raises:
        DataError: The system does not let a folder be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}); expected leave to read it")

    found: list[Path] = []
    seen: set[Path] = set()
    waiting = [root]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            here = Path(place)
            if (real := here.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted({*folders} - SYSTEM_FOLDERS)
            waiting += [here / name for name in folders if (here / name).is_symlink()]  # not walked into from here
            found += [here / name for name in names]
    return sorted(found)


def _fixed_parts(pattern: Path) -> list[str]:
    """The leading parts of a glob that hold no wildcard, as they are on the disk; never the last part."""
    fixed: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(ESCAPED.sub("", part)):
            break
        fixed.append(ESCAPED.sub(r"\1", part))
    return fixed or ["."]
