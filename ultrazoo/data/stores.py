"""Where the documents of a window come from: text that is tokenised now, or a cache that was tokenised before."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.encoding import Encoder
from ultrazoo.data.files import cache_errors
from ultrazoo.data.packing import Documents, ragged
from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import ParquetSource, Span
from ultrazoo.data.split import Split
from ultrazoo.data.tokenizer import Vocabulary
from ultrazoo.errors import DataError

COUNTED_ROWS = 1 << 16
"""Rows whose held-out tokens are counted at once."""


@dataclass(frozen=True)
class Reading:
    """The documents of some spans, and what was met on the way.

    That is unusable rows by reason, bytes of usable text, and row group -> damage that hides some of the rows.
    """

    documents: Documents
    skipped: Counter[str]
    bytes: int
    damage: dict[str, str] = field(default_factory=dict)


class Store(Protocol):
    """Both kinds give the same documents for the same spans."""

    def read(self, spans: Iterable[Span], *, held_out: bool) -> Reading:
        """Return the documents of the spans' rows that are, or are not, held out for validation."""


class TextStore:
    """Reads Parquet and tokenises at once; each process opens files and threads of its own, on first use."""

    def __init__(self, source: ParquetSource, vocabulary: Vocabulary, split: Split, threads: int) -> None:
        self.source, self.vocabulary, self.split, self.threads = source, vocabulary, split, threads
        self._tools: tuple[int, RowReader, Encoder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tools": None}

    def read(self, spans: Iterable[Span], *, held_out: bool) -> Reading:
        """Return the documents of the spans' rows that are, or are not, held out for validation."""
        if self._tools is None or self._tools[0] != os.getpid():
            self._tools = (os.getpid(), RowReader(self.source), Encoder(self.vocabulary, self.threads))
        _, reader, encoder = self._tools
        texts: list[str] = []
        skipped: Counter[str] = Counter()
        damage: dict[str, str] = {}
        for span in spans:
            keep = self.split.held_out(span) == held_out
            rows = reader.read(span, keep, skipped, damage)
            texts += [text for text in rows if text is not None]
        ids, lengths = encoder.encode(texts)
        size = sum(len(text.encode()) for text in texts)
        return Reading(Documents(ids, np.cumsum(lengths) - lengths, lengths), skipped, size, damage)


class _CacheFile:
    """Numbers of one file of a cache, read by their position; processes that are forked share it.

    It is read and not mapped into memory: where a mapped file is cut short, the process ends with SIGBUS.

    Args:
        path: The file.
        size: Bytes that were written to it.
        dtype: Of its numbers.

    Raises:
        DataError: It cannot be opened, or has another size.
    """

    def __init__(self, path: Path, size: int, dtype: str) -> None:
        self._arguments = (path, size, dtype)
        self.path, self.size, self.dtype = path, size, np.dtype(dtype)
        with cache_errors(path):
            self._file = path.open("rb", buffering=0)
        if self._size() != size:
            raise self._cut_short()

    def __reduce__(self) -> tuple[type[_CacheFile], tuple[Path, int, str]]:
        return _CacheFile, self._arguments

    def __len__(self) -> int:
        return self.size // self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return numbers ``start`` to ``stop``.

        Raises:
            DataError: The file ends before them, or cannot be read.
        """
        first, wanted, content = start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize, b""
        with cache_errors(self.path):
            while rest := wanted - len(content):
                if not (more := os.pread(self._file.fileno(), rest, first + len(content))):
                    raise self._cut_short()
                content += more
        return np.frombuffer(content, self.dtype)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _cut_short(self) -> DataError:
        return DataError(
            f"{self.path}: has {self._size()} bytes, expected {self.size}: the cache was changed while it was in use; "
            "resume the run, which builds a damaged cache again"
        )


class TokenStore:
    """A complete cache."""

    def __init__(self, folder: Path, source: ParquetSource, vocabulary: Vocabulary, split: Split) -> None:
        self.folder, self.source, self.vocabulary, self.split = folder, source, vocabulary, split
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        dtype = self.manifest["dtype"]
        self._shards: list[tuple[_CacheFile, _CacheFile]] = []
        starts = np.cumsum(source.unit_rows) - source.unit_rows
        self._first_rows: list[int] = []
        self._shard_of: list[int] = []
        for number, shard in enumerate(self.manifest["shards"]):
            self._shards.append((self._file(shard["tokens"], dtype), self._file(shard["offsets"], "int64")))
            first, last = shard["units"]
            self._shard_of += [number] * (last - first)
            self._first_rows += (starts[first:last] - starts[first]).tolist()

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(vocabulary,) occurrences of each id in the whole cache."""
        file = self._file("counts", "int64")
        return file.read(0, len(file))

    def held_out_counts(self) -> NDArray[np.int64]:
        """Return (vocabulary,) occurrences of each id in the held-out rows; reads the whole cache once.

        Raises:
            DataError: An id that the tokenizer does not have: the cache is damaged.
        """
        counts = np.zeros(self.vocabulary.size, np.int64)
        for unit, rows in enumerate(self.source.unit_rows.tolist()):
            for start in range(0, rows, COUNTED_ROWS):
                span = Span(unit, start, min(start + COUNTED_ROWS, rows))
                tokens, edges = self._tokens_of(span)
                keep = self.split.held_out(span)
                ids = tokens[ragged(edges[:-1][keep], np.diff(edges)[keep])]
                self._require_known(ids)
                counts += np.bincount(ids, minlength=len(counts))
        return counts

    def read(self, spans: Iterable[Span], *, held_out: bool) -> Reading:
        """Return the documents of the spans' rows that are, or are not, held out for validation.

        Raises:
            DataError: The cache was cut short or damaged after it was checked.
        """
        parts: list[NDArray[Any]] = []
        starts: list[NDArray[np.int64]] = []
        lengths: list[NDArray[np.int64]] = []
        size = 0
        for span in spans:
            part, edges = self._tokens_of(span)
            keep = self.split.held_out(span) == held_out
            starts.append((edges[:-1] + size)[keep])
            lengths.append(np.diff(edges)[keep])
            parts.append(part)
            size += len(part)
        ids = _join(parts)
        self._require_known(ids)
        return Reading(Documents(ids, _join(starts), _join(lengths)), Counter(), 0)

    def _tokens_of(self, span: Span) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the tokens of a span, and the edges of its rows in them, from 0."""
        tokens, offsets = self._shards[self._shard_of[span.unit]]
        first = self._first_rows[span.unit]
        edges = offsets.read(first + span.start, first + span.stop + 1)
        if not (edges[0] >= 0 and edges[-1] <= len(tokens) and np.all(edges[:-1] <= edges[1:])):
            raise self._damage(f"{offsets.path.name} holds positions outside of {tokens.path.name}")
        return tokens.read(int(edges[0]), int(edges[-1])), edges - edges[0]

    def _require_known(self, ids: NDArray[Any]) -> None:
        if len(ids) and int(ids.max()) >= self.vocabulary.size:
            raise self._damage(f"holds id {int(ids.max())}, expected ids below {self.vocabulary.size}")

    def _file(self, name: str, dtype: str) -> _CacheFile:
        return _CacheFile(self.folder / name, self.manifest["files"][name][0], dtype)

    def _damage(self, what: str) -> DataError:
        return DataError(
            f"{self.folder}: {what}: the cache is damaged; delete the folder, or run once with "
            "training.prefer_local_cache=false"
        )


def _join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
