"""Rows of text from row groups, read forwards; every unusable row is counted by its reason."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ultrazoo.data.digests import ChangedError, Identity
from ultrazoo.data.sources import DamagedError, ParquetSource, Span, damage_told, open_parquet
from ultrazoo.errors import DataError

OPEN_CURSORS = 24
BATCH = 1024
"""Rows decoded at a time: damage in a row group costs the rows from the beginning of such a batch on."""
LOST, CHANGED = "in a damaged row group", "in a file that changed during the run"


class _Cursor:
    """A row group read forwards, batch by batch."""

    def __init__(self, source: ParquetSource, unit: int) -> None:
        entry = source.units[unit]
        self.path, self.place = source.files[entry.file].path, source.place(unit)
        self.position = 0
        self.damage: DamagedError | None = None
        self._parquet = open_parquet(self.path)
        self._batches: Iterator[pa.RecordBatch] = self._parquet.iter_batches(
            batch_size=BATCH, row_groups=[entry.group], columns=[source.text_column], use_threads=False
        )
        self._held: pa.Array | None = None

    def take(self, start: int, stop: int) -> list[pa.Array]:
        """Return rows ``start`` to ``stop``, or those before the ``damage``; start is never before the position."""
        taken = []
        while self.position < stop:
            if self._held is None or not len(self._held):
                try:
                    self._held = self._next()
                except DamagedError as error:
                    self.damage = error
                    break
            skip = min(max(start - self.position, 0), len(self._held))
            count = min(stop - self.position - skip, len(self._held) - skip) if skip < len(self._held) else 0
            if count:
                taken.append(self._held.slice(skip, count))
            self._held = self._held.slice(skip + count)
            self.position += skip + count
        return taken

    def _next(self) -> pa.Array:
        what = f"{self.place} is damaged near its row {self.position}"
        with damage_told(what, "pages whose checksums hold; restore the file"):
            batch = next(self._batches, None)
        if batch is None:
            raise DamagedError(f"{self.place} ends early, at row {self.position}; restore the file")
        return batch.column(0)

    def close(self) -> None:
        self._parquet.close()


class RowReader:
    """Reads spans of rows; keeps the row groups it is in the middle of open, so that going on costs nothing.

    Args:
        source: The row groups.
        keeping: What is read is kept under the fingerprint of the data, so a file that has changed is an error also
            under ``on_bad_data: skip``.
    """

    def __init__(self, source: ParquetSource, *, keeping: bool = False) -> None:
        self.source = source
        self._strict = source.on_bad_data == "error"
        self._keeping = keeping
        self._cursors: OrderedDict[int, _Cursor] = OrderedDict()
        self._ends: dict[int, tuple[int, DamagedError]] = {}
        """Row group -> its first row that damage hides, and the damage."""
        self._identities: dict[int, Identity] = {}
        self._changed: dict[int, ChangedError] = {}

    def read(
        self, span: Span, keep: NDArray[np.bool_] | None, skipped: Counter[str], damage: dict[str, str] | None = None
    ) -> list[str | None]:
        """Return the texts of a span, None where a row is not wanted or unusable.

        Args:
            span: Rows of one row group.
            keep: (rows,) which are wanted; None means all.
            skipped: Counts the wanted rows that are unusable, by reason.
            damage: Takes row group or file -> damage that hides rows of the span.

        Raises:
            DataError: Under ``on_bad_data: error``, a wanted row is unusable, the row group is damaged or the file is
                not what it was when the run began; the message names file, row group and row. In any case, the system
                does not let the file be read.
        """
        rows = span.stop - span.start
        file = self.source.units[span.unit].file
        kind = self.source.files[file].kind
        if kind in ("other", "null"):
            wanted = rows if keep is None else int(keep.sum())
            if wanted:
                reason = "not text" if kind == "other" else "null"
                if self._strict:
                    raise self._refusal(span.unit, span.start, reason)
                skipped[reason] += wanted
            return [None] * rows
        values = self._values(span)
        if len(values) < rows:
            changed = self._changed.get(file)
            error = changed or self._ends[span.unit][1]
            if self._strict or (changed and self._keeping):
                raise error
            if damage is not None:
                damage[str(self.source.files[file].path) if changed else self.source.place(span.unit)] = str(error)
            lost = rows - len(values) if keep is None else int(keep[len(values) :].sum())
            if lost:
                skipped[CHANGED if changed else LOST] += lost
        texts: list[str | None] = [None] * rows
        for row, value in enumerate(values):
            if keep is None or keep[row]:
                texts[row] = clean(value, skipped)
                if texts[row] is None and self._strict:  # the first of all: nothing was counted before
                    raise self._refusal(span.unit, span.start + row, next(iter(skipped)))
        return texts

    def _has_changed(self, file: int) -> bool:
        """Whether a file is not what it was when the run began; once it has changed, it stays so."""
        if file not in self._changed and (error := self._change(file)) is not None:
            self._changed[file] = error
        return file in self._changed

    def _change(self, file: int) -> ChangedError | None:
        """Why a file is not the one that was hashed at the start; it is hashed again if its status differs."""
        entry = self.source.files[file]
        what = f"{entry.path}: is not what it was when the run began"
        expected = "put the file back and resume, or start a new run with the new one"
        with damage_told(f"{entry.path}: cannot be read any more", "the file that was there at the start"):
            identity = Identity.of(entry.path.stat())
            if identity == self._identities.setdefault(file, entry.identity):
                return None
            if identity.size != entry.size:
                return ChangedError(f"{what}: got {identity.size} bytes, expected {entry.size}; {expected}")
            try:
                self._identities[file], digest = self.source.digests.of(entry.path)
            except ChangedError as error:
                return error
        return None if digest == entry.digest else ChangedError(f"{what}: its content has changed; {expected}")

    def _values(self, span: Span) -> list[str | bytes | None]:
        """Values of a span's rows up to damage; none if the file has changed since the run began."""
        file = self.source.units[span.unit].file
        if file in self._changed:
            return []
        if span.unit in self._ends:
            end = self._ends[span.unit][0]
            if end <= span.start:
                return []
            span = span._replace(stop=min(span.stop, end))
        cursor = self._cursors.pop(span.unit, None)
        if cursor is not None and cursor.position > span.start:
            cursor.close()
            cursor = None
        if cursor is None:
            try:
                cursor = _Cursor(self.source, span.unit)
            except DamagedError as error:
                self._ends[span.unit] = (0, error)
            if self._has_changed(file) or cursor is None:  # nothing of another file is decoded: it may lack the column
                return []
        values = [value for array in cursor.take(span.start, span.stop) for value in _values(array)]
        if cursor.damage is not None:
            self._ends[span.unit] = (cursor.position, cursor.damage)
            cursor.close()
        elif span.stop < self.source.units[span.unit].rows:
            self._cursors[span.unit] = cursor
            if len(self._cursors) > OPEN_CURSORS:
                self._cursors.popitem(last=False)[1].close()
        else:
            cursor.close()
        return [] if self._has_changed(file) else values

    def _refusal(self, unit: int, row: int, reason: str) -> DataError:
        return DataError(
            f"{self.source.place(unit)}, row {row}: {reason}; expected text; training.on_bad_data is error: take the "
            "row out, or set it to skip, which counts such rows and goes on"
        )


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
