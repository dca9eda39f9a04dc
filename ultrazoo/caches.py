"""Where ultrazoo keeps what it can make again, and whether what is there may be loaded as code.

A library of kernels is code: whoever can write it, or rename a folder above it, decides what this process runs. So a
folder of kernels is used only while its user and root alone can change it, by the rule that ssh has for its keys.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ultrazoo.errors import UltrazooError

CODE = (".so", ".o")
PRIVATE = 0o700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
log = logging.getLogger("ultrazoo")


class UntrustedError(UltrazooError):
    """No folder here is safe to load code from; ``fix`` says what the user can do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


def cache_home() -> Path:
    """Return ``$XDG_CACHE_HOME/ultrazoo``, or else ``~/.cache/ultrazoo``, or without a home a temporary folder."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root).absolute() / "ultrazoo"
    home = _home()
    if home is None:
        folder = temporary_home()
        _warn(f"caches: this user has no home folder, so {folder} is used; set HOME or XDG_CACHE_HOME to keep them")
        return folder
    return home / ".cache" / "ultrazoo"


def temporary_home() -> Path:
    """Return the folder of this user for caches among the temporary files."""
    return Path(tempfile.gettempdir()).absolute() / f"ultrazoo-{_user()}"


def private_folder(name: str) -> Path:
    """Return the folder ``name`` of the cache, made for its user alone, to load code from.

    What others could have written there is discarded. If they can write to a folder above the cache, the temporary
    folder of this user is taken instead, with a warning.

    Raises:
        UntrustedError: Neither is safe.
        OSError: The folder cannot be made.
    """
    problems: list[tuple[str, str]] = []
    for home in dict.fromkeys((cache_home(), temporary_home())):
        reason, culprit = _above(home)
        if not reason:
            _make_private(home, home / name)
            for found, fix in problems:
                _warn(f"caches: {found}: code is kept in {home / name} instead; {fix}")
            return home / name
        fix = f"make {culprit} writable by you alone, or set XDG_CACHE_HOME to a folder of your own"
        problems.append((reason, fix))
    raise UntrustedError(*problems[0])


def untrusted(path: Path) -> str:
    """Return why a file or folder may have been changed by others than its user and root; empty if it cannot."""
    for part in _up_from(path):
        if reason := _loose(part):
            return reason
    return ""


def _above(home: Path) -> tuple[str, Path]:
    """Why the folders above a cache are not safe, and the one that is not; a cache of someone else is not either."""
    for part in _up_from(home):
        reason = _loose(part)
        if reason and not (part == home and _is_ours(part)):
            return reason, part
    return "", home


def _make_private(home: Path, folder: Path) -> None:
    """Make a folder of a cache, without what others could have put into it."""
    loose = "" if not home.exists() else _loose(home)
    reason = loose or (_within(folder) if folder.exists() else "")
    if loose:
        home.chmod(stat.S_IMODE(home.stat().st_mode) & ~OTHERS_WRITE)
    if reason and folder.exists():
        _warn(f"caches: {reason}: what is in {folder} is discarded and made again")
        aside = folder.with_name(f"{folder.name}.untrusted-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process has just done so
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    for part in (*reversed(home.parents), home, folder):
        if not part.is_dir():
            part.mkdir(mode=PRIVATE, exist_ok=True)


def _within(folder: Path) -> str:
    """Why the code in a folder is not safe to load; empty if it is."""
    if reason := _loose(folder):
        return reason
    for root, folders, files in os.walk(folder, followlinks=True):
        inner = [Path(root, name) for name in (*folders, *(name for name in files if name.endswith(CODE)))]
        for path in inner:
            if reason := untrusted(path) if path.is_symlink() else _loose(path):
                return reason
    return ""


def _up_from(path: Path) -> Iterator[Path]:
    """What is there of a path, from its end up to the home of its user or the root; then the same of its target."""
    home = _home()
    for spelled in dict.fromkeys((path.absolute(), path.resolve())):
        for part in (spelled, *spelled.parents):
            if os.path.lexists(part):
                yield part
            if part == home:
                break


def _loose(path: Path) -> str:
    """Why others than its user and root can change one file or folder, or what it links to; empty if they cannot."""
    if os.name != "posix":
        return ""
    try:
        states = path.lstat(), path.stat()
    except FileNotFoundError:  # another process has just finished a build, or it is a link to nothing
        return ""
    for found in states:
        if found.st_uid not in _trusted():
            return f"{path} belongs to user {found.st_uid}, neither to {_user()} nor to root"
        if stat.S_ISLNK(found.st_mode):
            continue
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # there, others cannot rename ours
        if found.st_mode & OTHERS_WRITE and not sticky:
            return f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _is_ours(path: Path) -> bool:
    return path.stat().st_uid == _user() == path.lstat().st_uid


def _trusted() -> set[int]:
    """This user and root; in a user namespace, root outside of it is whoever has the root folder."""
    return {_user(), 0, Path("/").stat().st_uid}


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and the password database does not know this user
        return None
    return home if home.is_dir() and home != Path("/") else None


@functools.cache
def _warn(text: str) -> None:
    """Once per process."""
    log.warning(text)
