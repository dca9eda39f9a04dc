"""Where the documents of a window come from: text that is tokenised now, or a cache that was tokenised before."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.encoding import Encoder
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


class TokenStore:
    """A complete cache, memory-mapped."""

    def __init__(self, folder: Path, source: ParquetSource, vocabulary: Vocabulary, split: Split) -> None:
        self.folder, self.source, self.vocabulary, self.split = folder, source, vocabulary, split
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        self._maps = self._open()
        starts = np.cumsum(source.unit_rows) - source.unit_rows
        self._first_rows: list[int] = []
        self._shard_of: list[int] = []
        for number, shard in enumerate(self.manifest["shards"]):
            first, last = shard["units"]
            self._shard_of += [number] * (last - first)
            self._first_rows += (starts[first:last] - starts[first]).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = self._open()

    @property
    def counts(self) -> NDArray[np.int64]:
        """(vocabulary,) occurrences of each id in the whole cache."""
        return np.fromfile(self.folder / "counts", np.int64)

    def held_out_counts(self) -> NDArray[np.int64]:
        """Return (vocabulary,) occurrences of each id in the held-out rows; the other rows are not read.

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
            DataError: An id that the tokenizer does not have: the cache is damaged.
        """
        parts: list[NDArray[Any]] = []
        starts: list[NDArray[np.int64]] = []
        lengths: list[NDArray[np.int64]] = []
        size = 0
        for span in spans:
            tokens, edges = self._tokens_of(span)
            part = tokens[int(edges[0]) : int(edges[-1])]
            keep = self.split.held_out(span) == held_out
            starts.append((edges[:-1] - edges[0] + size)[keep])
            lengths.append(np.diff(edges)[keep])
            parts.append(part)
            size += len(part)
        ids = _join(parts)
        self._require_known(ids)
        return Reading(Documents(ids, _join(starts), _join(lengths)), Counter(), 0)

    def _tokens_of(self, span: Span) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The tokens of the shard that holds a span, and the edges of the span's rows in it."""
        tokens, offsets = self._maps[self._shard_of[span.unit]]
        first = self._first_rows[span.unit]
        return tokens, offsets[first + span.start : first + span.stop + 1]

    def _require_known(self, ids: NDArray[Any]) -> None:
        if len(ids) and int(ids.max()) >= self.vocabulary.size:
            raise DataError(
                f"{self.folder}: holds id {int(ids.max())}, expected ids below {self.vocabulary.size}: the cache is "
                "damaged; delete the folder, or run once with training.prefer_local_cache=false"
            )

    def _open(self) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        return [
            (_map(self.folder / shard["tokens"], self.manifest["dtype"]), _map(self.folder / shard["offsets"], "int64"))
            for shard in self.manifest["shards"]
        ]


def _map(path: Path, dtype: str) -> NDArray[Any]:
    """Map a file; an empty one cannot be mapped."""
    return np.memmap(path, np.dtype(dtype), "r") if path.stat().st_size else np.zeros(0, np.dtype(dtype))


def _join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
