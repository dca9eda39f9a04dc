"""Checks Parquet files at the start: footers and the text column, no text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultrazoo.data.digests import HASHING, SAMPLED_FROM, ChangedError, Digests, Identity, sampled_digest
from ultrazoo.data.finding import CORPUS, DISCOVERY, Found, find_files
from ultrazoo.data.progress import Progress
from ultrazoo.errors import DataError, did_you_mean

READ_BUFFER = 1 << 20

OnBadData = Literal["skip", "error"]


class DamagedError(DataError):
    """A file or row group cannot be read for what it holds, not for the machine's state."""


class Span(NamedTuple):
    """Rows ``start <= row < stop`` of one row group; ``unit`` numbers the row groups of a source."""

    unit: int
    start: int
    stop: int


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file as its footer describes it; ``group_rows`` are the rows of each row group."""

    path: Path
    name: str
    identity: Identity
    digest: str
    group_rows: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity.size


@dataclass(frozen=True)
class DamagedFile:
    """A file that is left out, and why."""

    name: str
    size: int
    digest: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """A row group: file number, number within the file, rows used, and the row of the file that it begins with."""

    file: int
    group: int
    rows: int
    first_row: int


@dataclass(frozen=True)
class ParquetSource:
    """The row groups that a run may read, in file order."""

    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    text_column: str
    max_samples: int | None
    damaged: tuple[DamagedFile, ...] = ()
    on_bad_data: OnBadData = "skip"
    found: Found = field(default_factory=lambda: Found([], CORPUS))
    digests: Digests = field(default_factory=Digests)

    @cached_property
    def unit_rows(self) -> NDArray[np.int64]:
        """Rows of each row group."""
        return np.array([unit.rows for unit in self.units], dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Rows in all, usable or not."""
        return int(self.unit_rows.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, contents, text column and row limit; times and folders are not part of it.

        A file that is skipped as damaged is part of it: put right, it would bring other rows.
        """
        return self._fingerprint({})

    @property
    def large_files(self) -> list[SourceFile | DamagedFile]:
        """The files whose contents earlier versions compared by samples."""
        both: list[SourceFile | DamagedFile] = [*self.files, *self.damaged]
        return [file for file in both if file.size > SAMPLED_FROM]

    def fingerprint_by(self, hashing: int) -> str:
        """Return the fingerprint as a revision of the hashing of files makes it.

        Args:
            hashing: 1 for checkpoints and caches that do not say; else HASHING.
        """
        return self._sampled_fingerprint if hashing < HASHING and self.large_files else self.fingerprint

    @cached_property
    def _sampled_fingerprint(self) -> str:
        return self._fingerprint({file.name: sampled_digest(self.found.root / file.name) for file in self.large_files})

    def _fingerprint(self, digests: dict[str, str]) -> str:
        """The hash of all that the rows depend on; ``digests`` replace those of some files."""
        named = [(file.name, file.size, digests.get(file.name, file.digest), file.group_rows) for file in self.files]
        facts: list[object] = [named, self.text_column, self.max_samples]
        if self.damaged:
            facts.append([(file.name, file.size, digests.get(file.name, file.digest)) for file in self.damaged])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def place(self, unit: int) -> str:
        """Name a row group, for messages and records."""
        entry = self.units[unit]
        return f"{self.files[entry.file].path}: row group {entry.group}"

    @property
    def is_embedded(self) -> bool:
        """True for the corpus that the package ships."""
        return all(file.path.parent == CORPUS for file in self.files)


def open_source(
    location: str | None,
    text_column: str = "text",
    max_samples: int | None = None,
    on_bad_data: OnBadData = "skip",
    *,
    digests: Digests | None = None,
    discovery: int = DISCOVERY,
    console: Callable[[str], None] = lambda line: None,
) -> ParquetSource:
    """Find the files, read their footers, check the text column and hash what is not known to be unchanged.

    Args:
        location: A file, a folder (searched recursively, in order of name) or a glob; None is the embedded corpus.
        text_column: Column that holds the text.
        max_samples: Most rows to use, counted from the first file on.
        on_bad_data: What to do about a file that is not Parquet or is cut short, and later about what cannot be read.
        digests: Where hashes of files are kept; None keeps none.
        discovery: Revision of the rules of which files are read.
        console: Takes lines of progress.

    Raises:
        DataError: No file, none that is complete, one that is not under ``error``, a missing column, or no rows.
    """
    found, digests = find_files(location, discovery), digests or Digests()
    described: dict[Path, tuple[Identity, tuple[int, ...], str]] = {}
    refused: dict[Path, DamagedError] = {}
    for path in found.files:
        try:
            described[path] = _describe(path, text_column)
        except DamagedError as error:
            if on_bad_data == "error":
                raise
            refused[path] = error
    if not described:
        others = f" (and {len(refused) - 1} more: none of the files can be read)" if len(refused) > 1 else ""
        raise DataError(str(next(iter(refused.values()))) + others)
    whole: list[SourceFile] = []
    damaged: list[DamagedFile] = []
    there = {path: path.stat().st_size for path in found.files if path.is_file()}
    progress = Progress("hashing data files", sum(there.values()), console)
    for path in found.files:
        name = path.relative_to(found.root).as_posix()
        if path in described:
            before, groups, kind = described[path]
            identity, digest = _digest(path, digests, progress)
            if identity != before:
                raise ChangedError(f"{path}: was written while it was read; expected a complete file; start again")
            whole.append(SourceFile(path.resolve(), name, identity, digest, groups, kind))
        else:
            digest = _digest(path, digests, progress)[1] if path in there else ""
            damaged.append(DamagedFile(name, there.get(path, 0), digest, str(refused[path])))
    files = tuple(whole)
    if all(file.kind == "other" for file in files):
        raise DataError(
            f"{files[0].path}: column {text_column!r} holds no text in any of {len(files)} file(s); expected a string "
            f"column; set training.text_column to one of: {_columns(files[0].path)}"
        )
    units = tuple(_units(files, max_samples))
    if not units:
        raise DataError(f"{location or CORPUS}: {len(files)} Parquet file(s) without a single row; expected text")
    return ParquetSource(files, units, text_column, max_samples, tuple(damaged), on_bad_data, found, digests)


def _units(files: Sequence[SourceFile], max_samples: int | None) -> Iterator[Unit]:
    """The row groups of files, up to a number of rows."""
    left = sum(sum(file.group_rows) for file in files) if max_samples is None else max_samples
    for number, file in enumerate(files):
        first = 0
        for group, rows in enumerate(file.group_rows):
            if (used := min(rows, left)) > 0:
                yield Unit(number, group, used, first)
            left -= used
            first += rows


def _digest(path: Path, digests: Digests, progress: Progress) -> tuple[Identity, str]:
    with damage_told(f"{path}: cannot be hashed", "a file that can be read"):
        return digests.of(path, lambda size: progress.add(0, size, size))


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file for reading little by little, with page checksums verified.

    Raises:
        DamagedError: The file is not Parquet or is cut short.
        DataError: The system does not let it be read.
    """
    with damage_told(f"{path}: not a readable Parquet file", "a complete one; it may be cut short: copy it again"):
        return pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False, page_checksum_verification=True)


@contextmanager
def damage_told(what: str, expected: str) -> Iterator[None]:
    """Turn Arrow's errors into a DamagedError, and those of the system or for want of memory into a DataError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise DataError(f"{what} ({brief(error)}): the machine, not the data; cure that, then resume") from error
        raise DamagedError(
            f"{what} ({brief(error)}); expected {expected}, or take it out of training.local_parquet_dir"
        ) from error


def _columns(path: Path) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in open_parquet(path).schema_arrow) or "none"


def _describe(path: Path, text_column: str) -> tuple[Identity, tuple[int, ...], str]:
    """The identity of a file, rows of each of its row groups, and what its text column holds."""
    if not path.is_file():
        what = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "not a file"
        raise DamagedError(f"{path}: {what}; expected a Parquet file; repair it, or remove it from the data")
    identity = Identity.of(path.stat())
    with (
        open_parquet(path) as parquet,
        damage_told(f"{path}: its footer cannot be read", "a complete Parquet file: copy it again"),
    ):
        schema, metadata = parquet.schema_arrow, parquet.metadata
        if text_column not in schema.names:
            raise DataError(
                f"{path}: no column {text_column!r}; {did_you_mean(text_column, schema.names)}set training.text_column "
                f"to one of: {_columns(path)}"
            )
        kind = schema.field(schema.names.index(text_column)).type
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return identity, groups, "text"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return identity, groups, "bytes"
    return identity, groups, "null" if pa.types.is_null(kind) else "other"


def brief(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
