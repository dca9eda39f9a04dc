"""Rows of text from row groups, read forwards; every unusable row is counted by its reason."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ultrazoo.data.sources import ParquetSource, Span, brief, open_parquet
from ultrazoo.errors import DataError

OPEN_CURSORS = 24


class _Cursor:
    """A row group read forwards, batch by batch."""

    def __init__(self, source: ParquetSource, unit: int) -> None:
        entry = source.units[unit]
        self.path, self.group = source.files[entry.file].path, entry.group
        self.position = 0
        self._parquet = open_parquet(self.path)
        self._batches: Iterator[pa.RecordBatch] = self._parquet.iter_batches(
            batch_size=1024, row_groups=[entry.group], columns=[source.text_column], use_threads=False
        )
        self._held: pa.Array | None = None

    def take(self, start: int, stop: int) -> list[pa.Array]:
        """Return rows ``start`` to ``stop``; start is never before the position."""
        taken = []
        while self.position < stop:
            if self._held is None or not len(self._held):
                self._held = self._next()
            skip = min(max(start - self.position, 0), len(self._held))
            count = min(stop - self.position - skip, len(self._held) - skip) if skip < len(self._held) else 0
            if count:
                taken.append(self._held.slice(skip, count))
            self._held = self._held.slice(skip + count)
            self.position += skip + count
        return taken

    def _next(self) -> pa.Array:
        try:
            return next(self._batches).column(0)
        except StopIteration as error:
            raise DataError(f"{self.path}: row group {self.group} ends early, at row {self.position}") from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: row group {self.group} is damaged near its row {self.position} ({brief(error)}); "
                "expected pages whose checksums hold; restore the file, or take it out of training.local_parquet_dir"
            ) from error

    def close(self) -> None:
        self._parquet.close()


class RowReader:
    """Reads spans of rows; keeps the row groups it is in the middle of open, so that going on costs nothing."""

    def __init__(self, source: ParquetSource) -> None:
        self.source = source
        self._cursors: OrderedDict[int, _Cursor] = OrderedDict()

    def read(self, span: Span, keep: NDArray[np.bool_] | None, skipped: Counter[str]) -> list[str | None]:
        """Return the texts of a span, None where a row is not wanted or unusable.

        Args:
            span: Rows of one row group.
            keep: (rows,) which are wanted; None means all.
            skipped: Counts the wanted rows that are unusable, by reason.

        Raises:
            DataError: The row group is damaged; the message names file and row group.
        """
        rows = span.stop - span.start
        kind = self.source.files[self.source.units[span.unit].file].kind
        if kind in ("other", "null"):
            wanted = rows if keep is None else int(keep.sum())
            if wanted:
                skipped["not text" if kind == "other" else "null"] += wanted
            return [None] * rows
        cursor = self._cursors.pop(span.unit, None)
        if cursor is not None and cursor.position > span.start:
            cursor.close()
            cursor = None
        cursor = cursor or _Cursor(self.source, span.unit)
        values = [value for array in cursor.take(span.start, span.stop) for value in _values(array)]
        if span.stop < self.source.units[span.unit].rows:
            self._cursors[span.unit] = cursor
            if len(self._cursors) > OPEN_CURSORS:
                self._cursors.popitem(last=False)[1].close()
        else:
            cursor.close()
        if keep is None:
            return [clean(value, skipped) for value in values]
        return [clean(value, skipped) if wanted else None for value, wanted in zip(values, keep, strict=True)]


def _values(array: pa.Array) -> Sequence[str | bytes | None]:
    """Python values of an array; raw bytes where some value is not UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return array.cast(pa.large_binary()).to_pylist()


def clean(value: str | bytes | None, skipped: Counter[str]) -> str | None:
    """Return a row's text, or None with the reason counted: null, invalid UTF-8 or empty."""
    if value is None:
        skipped["null"] += 1
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            skipped["invalid UTF-8"] += 1
            return None
    if not value.strip():
        skipped["empty"] += 1
        return None
    return value


def reasons(skipped: Mapping[str, int]) -> str:
    """Return counts by reason as ``3 empty, 1 null``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
