"""Documents -> rows of tokens: cut into pieces, framed as [CLS] ... [SEP], packed several to a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.randomness import permutation

PIECES, ROWS = 2, 3
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """Token ids of many documents in one array; document i is ``ids[starts[i] : starts[i] + lengths[i]]``."""

    ids: NDArray[Any]
    starts: Ints
    lengths: Ints

    def compact(self) -> Documents:
        """Return the same documents without the ids that belong to none of them."""
        return Documents(self.ids[ragged(self.starts, self.lengths)], before(self.lengths), self.lengths)

    @staticmethod
    def join(parts: Sequence[Documents]) -> Documents:
        """Return the documents of all parts, in their order."""
        shifts = before(np.array([len(part.ids) for part in parts]))
        return Documents(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.starts + shift for part, shift in zip(parts, shifts, strict=True)]),
            np.concatenate([part.lengths for part in parts]),
        )


def before(sizes: Ints) -> Ints:
    """Return the sum of the sizes that stand before each."""
    return np.cumsum(sizes) - sizes


def ragged(starts: Ints, lengths: Ints) -> Ints:
    """Return ``starts[i], starts[i] + 1, ..., starts[i] + lengths[i] - 1`` for each i in turn."""
    return np.arange(lengths.sum()) + np.repeat(starts - before(lengths), lengths)


@dataclass(frozen=True)
class Frame:
    """What a row is made of: its length in tokens and the ids of [PAD], [CLS] and [SEP]."""

    max_length: int
    pad: int
    cls: int
    sep: int


def cut(documents: Documents, max_length: int) -> tuple[Ints, Ints]:
    """Cut documents into pieces that fit a row with [CLS] and [SEP]; return starts and lengths, without those two."""
    room = max_length - 2
    counts = -(-documents.lengths // room)
    nth = ragged(np.zeros_like(counts), counts)
    starts = np.repeat(documents.starts, counts) + nth * room
    lengths = np.minimum(np.repeat(documents.lengths, counts) - nth * room, room)
    return starts, lengths


def assign(lengths: Ints, max_length: int) -> tuple[Ints, int]:
    """Return the row of each piece and the number of rows, by best-fit decreasing.

    Args:
        lengths: (pieces,) tokens with [CLS] and [SEP], at most ``max_length``.
        max_length: Tokens of a row.
    """
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), dtype=np.int64)
    full = int(np.count_nonzero(lengths == max_length))
    rows[order[:full]] = np.arange(full)
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]
    occupied, count = 0, full  # bit r of occupied: some row has exactly r tokens left
    for piece, length in zip(order[full:].tolist(), lengths[order[full:]].tolist(), strict=True):
        fitting = occupied >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                occupied ^= 1 << left
        else:
            left, row = max_length, count
            count += 1
        rows[piece] = row
        left -= length
        if left > 2:
            open_rows[left].append(row)
            occupied |= 1 << left
    return rows, count


def count_rows(lengths: Ints, max_length: int, packed: bool) -> int:
    """Return the rows that documents of these lengths fill in one window."""
    empty = np.zeros(0, dtype=np.int64)
    _, pieces = cut(Documents(empty, np.zeros_like(lengths), lengths), max_length)
    return assign(pieces + 2, max_length)[1] if packed else len(pieces)


def pack(
    documents: Documents, frame: Frame, *, packed: bool, key: tuple[int, ...] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ``(tokens, segments)``, both (rows, max_length), of a window of documents.

    Args:
        documents: The window's documents; a longer one than a row continues in further pieces.
        frame: Length and special ids.
        packed: Several pieces per row, or one.
        key: Names the shuffle of pieces and rows; None keeps the order of the documents: rows come in the order of
            their first piece, pieces of a row in their own.
    """
    starts, lengths = cut(documents, frame.max_length)
    if key is not None:
        order = permutation(len(starts), PIECES, *key)
        starts, lengths = starts[order], lengths[order]
    rows, count = assign(lengths + 2, frame.max_length) if packed else (np.arange(len(starts)), len(starts))
    if key is not None:
        rows = permutation(count, ROWS, *key)[rows]
    else:
        _, first = np.unique(rows, return_index=True)
        rank = np.empty(count, dtype=np.int64)
        rank[np.argsort(first)] = np.arange(count)
        rows = rank[rows]
    by_row = np.argsort(rows, kind="stable")
    starts, lengths, rows = starts[by_row], lengths[by_row], rows[by_row]
    return _fill(documents.ids, starts, lengths, rows, count, frame)


def _fill(
    ids: NDArray[Any], starts: Ints, lengths: Ints, rows: Ints, count: int, frame: Frame
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lay pieces, sorted by row, side by side."""
    sizes = lengths + 2
    ahead = before(sizes)
    new_row = np.diff(rows, prepend=-1) > 0
    first = np.maximum.accumulate(np.where(new_row, np.arange(len(rows)), 0))
    places = rows * frame.max_length + ahead - ahead[first]
    tokens = np.full(count * frame.max_length, frame.pad, dtype=ids.dtype)
    segments = np.zeros(count * frame.max_length, dtype=np.uint16 if frame.max_length < 1 << 16 else np.int32)
    tokens[places] = frame.cls
    tokens[places + lengths + 1] = frame.sep
    tokens[ragged(places + 1, lengths)] = ids[ragged(starts, lengths)]
    segments[ragged(places, sizes)] = np.repeat(np.arange(len(rows)) - first + 1, sizes)
    shape = (count, frame.max_length)
    return tokens.reshape(shape), segments.reshape(shape)
