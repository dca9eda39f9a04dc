"""Packing: nothing lost, documents whole and framed, rows nearly full."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ultrazoo.data.packing import Documents, Frame, count_rows, pack

PAD, CLS, SEP = 0, 2, 3


def documents(lengths: list[int]) -> Documents:
    """Documents of consecutive ids from 10 on, none used twice, with unused ids between them."""
    starts = np.cumsum([0, *[n + 3 for n in lengths]])[: len(lengths)]
    total = sum(lengths) + 3 * len(lengths)
    return Documents(np.arange(10, 10 + total, dtype=np.uint32), starts.astype(np.int64), np.array(lengths, np.int64))


def pieces(tokens: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """Take rows apart, checking that documents are contiguous, numbered from 1 and followed by padding only."""
    found = []
    for row, numbers in zip(tokens.tolist(), segments.tolist(), strict=True):
        real = [number for number in numbers if number]
        assert numbers == real + [0] * (len(numbers) - len(real))
        assert real[0] == 1 and all(b - a in (0, 1) for a, b in pairwise(real))
        assert all(token == PAD for token in row[len(real) :])
        for number in range(1, real[-1] + 1):
            piece = [token for token, n in zip(row, numbers, strict=True) if n == number]
            assert piece[0] == CLS and piece[-1] == SEP
            found.append(piece[1:-1])
    return found


def expected(docs: Documents, room: int) -> list[list[int]]:
    whole = [docs.ids[s : s + n].tolist() for s, n in zip(docs.starts, docs.lengths, strict=True)]
    return [ids[i : i + room] for ids in whole for i in range(0, len(ids), room)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("key", [None, (1, 2, 3)])
@pytest.mark.parametrize("length", [8, 30, 128])
def test_every_token_is_in_one_row_once(packed: bool, key: tuple[int, ...] | None, length: int) -> None:
    chance = np.random.default_rng(length)
    docs = documents([0, 1, 2, *chance.integers(1, 300, 150).tolist(), 6, 28, 126, 252, 1000])
    tokens, segments = pack(docs, Frame(length, PAD, CLS, SEP), packed=packed, key=key)
    assert tokens.shape == segments.shape and tokens.dtype == docs.ids.dtype
    found, wanted = pieces(tokens, segments), expected(docs, length - 2)
    assert Counter(map(tuple, found)) == Counter(map(tuple, wanted))
    assert len(tokens) == count_rows(docs.lengths, length, packed) and (packed or len(tokens) == len(wanted))
    if key is None and not packed:
        assert found == wanted


def test_without_shuffle_rows_come_by_their_first_document() -> None:
    docs = documents(np.random.default_rng(0).integers(1, 60, 100).tolist())
    tokens, segments = pack(docs, Frame(64, PAD, CLS, SEP), packed=True, key=None)
    firsts = tokens[:, 1].tolist()
    assert firsts == sorted(firsts)
    for row, numbers in zip(tokens, segments, strict=True):
        inside = [token for token, number in zip(row.tolist(), numbers, strict=True) if number and token >= 10]
        assert inside == sorted(inside)


def test_keys_name_different_shuffles() -> None:
    docs = documents(np.random.default_rng(0).integers(1, 60, 100).tolist())
    frame = Frame(64, PAD, CLS, SEP)
    rows = [
        pack(docs, frame, packed=True, key=key)[0].tobytes() for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0))
    ]
    assert rows[0] == rows[3] and len(set(rows)) == 3


def test_rows_are_nearly_full() -> None:
    chance = np.random.default_rng(1)
    lengths = chance.integers(100, 400, 1024).tolist()
    for length in (64, 128, 512):
        _, segments = pack(documents(lengths), Frame(length, PAD, CLS, SEP), packed=True, key=(0,))
        assert (segments > 0).mean() > 0.97
    # no more rows than the best-fit bound of 11/9 optimum + 1, the optimum being at least the volume
    _, segments = pack(
        documents(chance.integers(1, 62, 2000).tolist()), Frame(64, PAD, CLS, SEP), packed=True, key=(0,)
    )
    assert len(segments) <= 11 / 9 * np.ceil((segments > 0).sum() / 64) + 1


def test_nothing_packs_to_nothing() -> None:
    for lengths in ([], [0, 0]):
        tokens, segments = pack(documents(lengths), Frame(16, PAD, CLS, SEP), packed=True, key=(0,))
        assert tokens.shape == segments.shape == (0, 16)


def test_joined_and_compacted_documents_are_the_same_documents() -> None:
    docs = documents([3, 0, 5, 2])
    compact = docs.compact()
    assert len(compact.ids) == 10 and expected(compact, 99) == expected(docs, 99)
    assert expected(Documents.join([docs, compact]), 99) == expected(docs, 99) * 2
