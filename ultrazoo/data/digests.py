"""SHA-256 of whole files, remembered as long as a file's size, times and inode stay the same."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ultrazoo.data.files import READ_BYTES, write_atomically
from ultrazoo.errors import DataError

HASHING = 2
"""Revision of how contents are compared. 1: files over SAMPLED_FROM by samples of their bytes."""
SAMPLED_FROM = 64 << 20
SAMPLED_PIECES, SAMPLED_BYTES = 64, 64 << 10
REMEMBERED_FROM = 4 << 20
"""Smaller files are hashed in less time than a record of the hash takes to write."""
SETTLED_NS = 2_000_000_000
"""Age of a change from which a later one is certain to have another time, also where times are whole seconds."""


class ChangedError(DataError):
    """A file is not what it was when the run began."""


class Identity(NamedTuple):
    """What a write or a replacement changes in a file's status; a copied mtime alone does not hide one from ctime."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Take it from a status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class Digests:
    """Hashes files, or looks up the hash of one whose identity has not changed since.

    Args:
        folder: Where hashes are kept, one file for each file hashed; None keeps none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.problem = ""
        """Why hashes could not be kept; empty if they were."""

    def of(self, path: Path, count: Callable[[int], None] = lambda size: None) -> tuple[Identity, str]:
        """Return a file's identity and the SHA-256 of all of its content.

        Args:
            path: A regular file.
            count: Takes the number of bytes that were just hashed or did not need to be.

        Raises:
            ChangedError: The file is being written.
            OSError: It cannot be read.
        """
        identity = Identity.of(path.stat())
        record = self._record(path)
        if record is not None and (known := self._recall(record, identity)) is not None:
            count(identity.size)
            return identity, known
        begun = time.time_ns()
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            before = Identity.of(os.fstat(file.fileno()))
            while block := file.read(READ_BYTES):
                digest.update(block)
                count(len(block))
            after = Identity.of(os.fstat(file.fileno()))
        if not identity == before == after:
            raise ChangedError(
                f"{path}: was written while it was read; expected a complete file; wait until it is finished"
            )
        if record is not None and identity.size >= REMEMBERED_FROM and begun - identity.ctime_ns > SETTLED_NS:
            self._remember(record, path, identity, digest.hexdigest())
        return identity, digest.hexdigest()

    def _record(self, path: Path) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        return self.folder / f"{name}.json"

    def _recall(self, record: Path, identity: Identity) -> str | None:
        try:
            kept = json.loads(record.read_bytes())
            return str(kept["sha256"]) if kept["identity"] == [*identity] else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None  # none yet, or damaged: the file is hashed

    def _remember(self, record: Path, path: Path, identity: Identity, digest: str) -> None:
        content = {"path": str(path.resolve()), "identity": identity, "sha256": digest}
        try:
            write_atomically(record, json.dumps(content).encode())
        except DataError as error:
            self.problem = str(error)


def sampled_digest(path: Path) -> str:
    """Return the digest of revision 1 for a file over SAMPLED_FROM: of its first, last and evenly spaced pieces."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in range(SAMPLED_PIECES):
            file.seek((size - SAMPLED_BYTES) * piece // (SAMPLED_PIECES - 1))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
