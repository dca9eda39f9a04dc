"""Whole-or-nothing files, checksums, and a lock between processes."""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ultrazoo.errors import DataError

READ_BYTES = 1 << 20


@contextmanager
def locked(path: Path, console: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file for the body; wait while another process holds it. A process that dies lets go of it.

    Raises:
        DataError: The folder cannot be written.
    """
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        waiting = False
        while not _take(descriptor):
            if not waiting:
                console(f"waiting for another process that is preparing this data ({path})")
            waiting = True
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Lock an open file without waiting; False if another process or thread has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's error about the cache into a DataError with the way out."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"training.cache_dir: {error.filename or path}: {error.strerror or error}; expected a writable folder with "
            "room for the tokens (about two bytes each); free some space, set training.cache_dir to another folder, or "
            "set training.stream_local_parquet to true, which needs no cache"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk and rename it into place.

    Raises:
        DataError: The folder cannot be written or is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


class SummedFile:
    """A file written from beginning to end and then flushed to the disk, with the size and CRC-32 of what went in.

    Args:
        path: The file; one that is there is written anew.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._size = self._crc = 0

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, content: bytes) -> None:
        """Add bytes at the end."""
        self._file.write(content)
        self._size, self._crc = self._size + len(content), zlib.crc32(content, self._crc)

    @property
    def sums(self) -> list[int]:
        """Size in bytes and CRC-32 of what was written so far."""
        return [self._size, self._crc]


def sums_of(path: Path) -> list[int]:
    """Return size in bytes and CRC-32 of a file; all of it is read.

    Raises:
        OSError: It cannot be read.
    """
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def first_changed(folder: Path, files: dict[str, list[int]]) -> str | None:
    """Return what is wrong with the first file of a folder that is not as it was written; None if all are.

    Args:
        folder: Where they are.
        files: Name -> size in bytes and CRC-32.
    """
    for name, (size, crc) in files.items():
        try:
            there = (folder / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes, expected {size}"
            if (found := sums_of(folder / name)[1]) != crc:
                return f"{name} has CRC-32 {found:08x}, expected {crc:08x}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
