"""Which files a location means, each once: a file, a folder or a glob; and which entries there are skipped, and why."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ultrazoo.errors import DataError

DISCOVERY = 2
"""Revision of these rules. 1: names that begin with . or _ were read, a file under each of its names, and of folders
only names that end in .parquet."""
PARQUET = (".parquet", ".parq", ".pq")
SYSTEM_FOLDERS = {"lost+found"}
"""At the top of a volume, for its administrator alone; never data."""
CORPUS = Path(__file__).resolve().with_name("corpus")
ESCAPED = re.compile(r"\[([*?[])\]")
"""A wildcard that stands for itself, as ``glob.escape`` writes it."""
HIDDEN, AGAIN = "whose name begins with . or _", "read already under another name"
FOLDER, EMPTY = "folder that the glob does not enter", "empty"
NAMED = 3
"""Skipped entries of each kind that the one-line summary names."""
log = logging.getLogger("ultrazoo")


def other_suffix(suffixes: Sequence[str]) -> str:
    """Return the reason for skipping a file that ends in none of these."""
    return f"without the suffix {', '.join(suffixes[:-1])} or {suffixes[-1]}"


@dataclass(frozen=True)
class Found:
    """The files of a location in order, the folder that their names are relative to, and skipped entry -> reason."""

    files: list[Path]
    root: Path
    skipped: dict[Path, str] = field(default_factory=dict)
    discovery: int = DISCOVERY


def find_files(location: str | None, discovery: int = DISCOVERY) -> Found:
    """Find the Parquet files of a location.

    Below a folder these are the names that end in .parquet, .parq or .pq, in any case. What begins with . or _ is not
    read unless the location itself or the pattern says so. A file with several names (links) is read under one of them.
    A link that leads nowhere is returned like any file, for it cannot be read either.

    Args:
        location: A file, a folder or a glob; None is the embedded corpus.
        discovery: Revision of the rules that a resumed run began with. If the rules of now find the same files, the
            result is theirs.

    Raises:
        DataError: Nothing there, nothing that is Parquet by its name, or a folder that cannot be read.
    """
    if location is None:
        return Found(sorted(CORPUS.glob("*.parquet")), CORPUS)
    where = f"training.local_parquet_dir: {location}"
    try:
        path = Path(location).expanduser()
        found = _find(path, DISCOVERY)
        earlier = _find(path, discovery) if discovery < DISCOVERY else found
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that nobody has
        raise DataError(f"{where}: cannot be looked up ({error}); expected a path that can be read here") from error
    if earlier.files != found.files:
        found = earlier
    for entry, reason in found.skipped.items():
        log.debug("data: skipped %s: %s", entry, reason)
    if not found.files:
        folder = path.is_dir()
        state = "no Parquet file in it" if folder else "no such file, folder or match"
        expected = f"a folder with files that end in {', '.join(PARQUET)}" if folder else "a Parquet file, a folder of "
        expected += "" if folder else "them or a glob such as 'texts/**/*.parquet'"
        skipped = f" (skipped: {summary(found.skipped, found.root)})" if found.skipped else ""
        raise DataError(
            f"{where}: {state}{skipped}; expected {expected}; convert .txt or .jsonl with 'ultrazoo data convert', or "
            "leave the field out to train on the embedded corpus"
        )
    return found


def _find(path: Path, discovery: int) -> Found:
    skipped: dict[Path, str] = {}
    if path.is_file():
        return Found([path], path.parent)
    if path.is_dir():
        if discovery == 1:
            walked = _walk(path, {}, hidden=True)
            return Found([item for item in walked if item.name.endswith(".parquet")], path, discovery=1)
        return Found(once(files_below(path, PARQUET, skipped), skipped), path, skipped)
    root = Path(*_fixed_parts(path))
    matches = sorted(Path(item) for item in glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [item for item in matches if not item.is_dir()]
    if discovery == 1:
        return Found(files, root, discovery=1)
    asked = {part[0] for part in path.parts[len(root.parts) :]}
    files = [item for item in files if not _skips_hidden(item, root, asked, skipped)]
    entered = {parent for item in [*files, *skipped] for parent in item.parents}
    skipped |= {item: FOLDER for item in matches if item.is_dir() and item not in entered | {root}}
    return Found(once(files, skipped), root, skipped)


def _skips_hidden(item: Path, root: Path, asked: set[str], skipped: dict[Path, str]) -> bool:
    """Whether a part below the root is hidden, and the pattern has no part that begins alike; if so, note it."""
    place = root
    for part in item.relative_to(root).parts:
        place /= part
        if part[0] in "._" and part[0] not in asked:
            skipped[place] = HIDDEN
            return True
    return False


def files_below(root: Path, suffixes: Sequence[str], skipped: dict[Path, str]) -> list[Path]:
    """Return the files below a folder with one of these suffixes, in any case, in order of name.

    Args:
        root: The folder; folders below it are entered, through links too, each once.
        suffixes: Endings, in lower case.
        skipped: Takes each entry that is not read, and why.

    Raises:
        DataError: The system does not let a folder be read.
    """
    found = []
    for item in _walk(root, skipped, hidden=False):
        if item.name.startswith((".", "_")):
            skipped[item] = HIDDEN
        elif not item.name.lower().endswith(tuple(suffixes)):
            skipped[item] = other_suffix(suffixes)
        else:
            found.append(item)
    return found


def _walk(root: Path, skipped: dict[Path, str], *, hidden: bool) -> list[Path]:
    """What is no folder below a folder, in order of name; each folder once, however many links lead to it."""

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
                skipped[here] = AGAIN
                continue
            seen.add(real)
            kept = {*folders} - SYSTEM_FOLDERS
            if not hidden:
                skipped |= {here / name: HIDDEN for name in kept if name.startswith((".", "_"))}
                kept = {name for name in kept if not name.startswith((".", "_"))}
            folders[:] = sorted(kept)
            waiting += [here / name for name in folders if (here / name).is_symlink()]  # not walked into from here
            found += [here / name for name in names]
    return sorted(found)


def once(files: Collection[Path], skipped: dict[Path, str]) -> list[Path]:
    """Return files without further names of the same inode, in the order given; a name that is no link is preferred.

    Args:
        files: The files; one that is not there is kept.
        skipped: Takes the names that are left away.
    """
    names: dict[tuple[int, int] | Path, list[Path]] = {}
    for path in dict.fromkeys(files):
        try:
            status = path.stat()
            key: tuple[int, int] | Path = (status.st_dev, status.st_ino) if status.st_ino else path.resolve()
        except (OSError, RuntimeError):  # a link that leads nowhere or in a circle: reading it says so
            key = path
        names.setdefault(key, []).append(path)
    kept = {group[0] if len(group) == 1 else min(group, key=_leads_elsewhere) for group in names.values()}
    skipped |= {path: AGAIN for path, count in Counter(files).items() if count > 1 or path not in kept}
    return [path for path in dict.fromkeys(files) if path in kept]


def _leads_elsewhere(path: Path) -> tuple[bool, bool]:
    """Orders the names of a file: no link first, then one that no linked folder is in, then links."""
    return path.is_symlink(), path.resolve() != path.absolute()


def summary(skipped: Mapping[Path, str], root: Path) -> str:
    """Return skipped entries by reason in one line, with the first names of each: ``2 empty (a.txt, b.txt)``."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in sorted(skipped.items()):
        by_reason.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in sorted(by_reason.items()):
        names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in paths]
        more = ", ..." if len(names) > NAMED else ""
        parts.append(f"{len(names):,} {reason} ({', '.join(names[:NAMED])}{more})")
    return ", ".join(parts)


def _fixed_parts(pattern: Path) -> list[str]:
    """The leading parts of a glob that hold no wildcard, as they are on the disk; never the last part."""
    fixed: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(ESCAPED.sub("", part)):
            break
        fixed.append(ESCAPED.sub(r"\1", part))
    return fixed or ["."]
