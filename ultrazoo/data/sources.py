"""Checks Parquet files at the start: footers and the text column, no text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultrazoo.data.finding import CORPUS, find_files
from ultrazoo.errors import DataError, did_you_mean

WHOLE_DIGEST_BYTES = 64 << 20
SAMPLED_PIECES, SAMPLED_BYTES = 64, 64 << 10
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
    size: int
    digest: str
    group_rows: tuple[int, ...]
    kind: str


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

        A file that is left out is part of it: put right, it would bring other rows.
        """
        named = [(file.name, file.size, file.digest, file.group_rows) for file in self.files]
        facts: list[object] = [named, self.text_column, self.max_samples]
        if self.damaged:
            facts.append([(file.name, file.size, file.digest) for file in self.damaged])
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
) -> ParquetSource:
    """Find the files, read their footers and check the text column; no text is read.

    Args:
        location: A file, a folder (searched recursively, in order of name) or a glob; None is the embedded corpus.
        text_column: Column that holds the text.
        max_samples: Most rows to use, counted from the first file on.
        on_bad_data: What to do about a file that is not Parquet or is cut short, and later about what cannot be read.

    Raises:
        DataError: No file, none that is whole, one that is not under ``error``, a missing column, or no rows.
    """
    paths, root = find_files(location)
    whole: list[SourceFile] = []
    damaged: list[DamagedFile] = []
    for path in paths:
        try:
            whole.append(_describe(path, root, text_column))
        except DamagedError as error:
            if on_bad_data == "error":
                raise
            name = path.relative_to(root).as_posix()
            facts = (path.stat().st_size, _digest(path)) if path.is_file() else (0, "")
            damaged.append(DamagedFile(name, *facts, str(error)))
    if not whole:
        others = f" (and {len(damaged) - 1} more: none of the files can be read)" if len(damaged) > 1 else ""
        raise DataError(damaged[0].reason + others)
    files = tuple(whole)
    if all(file.kind == "other" for file in files):
        raise DataError(
            f"{files[0].path}: column {text_column!r} holds no text in any of {len(files)} file(s); expected a string "
            f"column; set training.text_column to one of: {_columns(files[0].path)}"
        )
    left = sum(sum(file.group_rows) for file in files) if max_samples is None else max_samples
    units = []
    for number, file in enumerate(files):
        first = 0
        for group, rows in enumerate(file.group_rows):
            if (used := min(rows, left)) > 0:
                units.append(Unit(number, group, used, first))
            left -= used
            first += rows
    if not units:
        raise DataError(f"{location or CORPUS}: {len(files)} Parquet file(s) without a single row; expected text")
    return ParquetSource(files, tuple(units), text_column, max_samples, tuple(damaged), on_bad_data)


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


def _describe(path: Path, root: Path, text_column: str) -> SourceFile:
    if not path.is_file():
        what = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "not a file"
        raise DamagedError(f"{path}: {what}; expected a Parquet file; mend it, or take it out of the data")
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
        label = "text"
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        label = "bytes"
    else:
        label = "null" if pa.types.is_null(kind) else "other"
    name = path.relative_to(root).as_posix()
    return SourceFile(path.resolve(), name, path.stat().st_size, _digest(path), groups, label)


def _digest(path: Path) -> str:
    """SHA-256 of a file; of its first, last and evenly spaced pieces where it is large (the footer is in the last)."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_DIGEST_BYTES:
            while block := file.read(READ_BUFFER):
                digest.update(block)
            return digest.hexdigest()
        for piece in range(SAMPLED_PIECES):
            file.seek((size - SAMPLED_BYTES) * piece // (SAMPLED_PIECES - 1))
            digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()


def brief(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
