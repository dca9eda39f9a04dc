"""Whole-or-nothing files and a lock between processes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrazoo.errors import DataError


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
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    console(f"waiting for another process that is preparing this data ({path})")
                waiting = True
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


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
