"""Finds Parquet files and checks them at the start: footers and the text column, no text."""

from __future__ import annotations

import glob
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultrazoo.errors import DataError, did_you_mean

CORPUS = Path(__file__).resolve().with_name("corpus")
WHOLE_DIGEST_BYTES = 64 << 20
SAMPLED_PIECES, SAMPLED_BYTES = 64, 64 << 10
READ_BUFFER = 1 << 20


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
        """SHA-256 of names, sizes, contents, text column and row limit; times and folders are not part of it."""
        named = [(file.name, file.size, file.digest, file.group_rows) for file in self.files]
        facts = json.dumps([named, self.text_column, self.max_samples])
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def is_embedded(self) -> bool:
        """True for the corpus that the package ships."""
        return all(file.path.parent == CORPUS for file in self.files)


def open_source(location: str | None, text_column: str = "text", max_samples: int | None = None) -> ParquetSource:
    """Find the files, read their footers and check the text column; no text is read.

    Args:
        location: A file, a folder (searched recursively, in order of name) or a glob; None is the embedded corpus.
        text_column: Column that holds the text.
        max_samples: Most rows to use, counted from the first file on.

    Raises:
        DataError: No file, a file that is not Parquet or is cut short, a missing column, or no rows.
    """
    paths, root = find_files(location)
    files = tuple(_describe(path, root, text_column) for path in paths)
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
    return ParquetSource(files, tuple(units), text_column, max_samples)


def find_files(location: str | None) -> tuple[list[Path], Path]:
    """Return the Parquet files of a location in order, and the folder that their names are relative to.

    Raises:
        DataError: Nothing there, or nothing that ends in .parquet.
    """
    where = f"training.local_parquet_dir: {location}"
    if location is None:
        return sorted(CORPUS.glob("*.parquet")), CORPUS
    path = Path(location).expanduser()
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        found = sorted(item for item in path.rglob("*.parquet") if item.is_file())
        root = path
        expected = "a folder with *.parquet files"
    else:
        found = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())  # noqa: PTH207
        root = Path(*_fixed_parts(path))
        expected = "a Parquet file, a folder of them or a glob such as 'texts/**/*.parquet'"
    if not found:
        state = "no Parquet file in it" if path.is_dir() else "no such file, folder or match"
        raise DataError(
            f"{where}: {state}; expected {expected}; convert .txt or .jsonl with 'ultrazoo data convert', or leave the "
            "field out to train on the embedded corpus"
        )
    return found, root


def _fixed_parts(pattern: Path) -> list[str]:
    """The leading parts of a glob that hold no wildcard, the last part of the pattern never among them."""
    fixed: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed or ["."]


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file for reading little by little, with page checksums verified.

    Raises:
        DataError: The file is not Parquet, is cut short or cannot be read.
    """
    try:
        return pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({brief(error)}); expected a complete one; it may be cut short: "
            "copy it again, or take it out of training.local_parquet_dir"
        ) from error


def _columns(path: Path) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in open_parquet(path).schema_arrow) or "none"


def _describe(path: Path, root: Path, text_column: str) -> SourceFile:
    with open_parquet(path) as parquet:
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
