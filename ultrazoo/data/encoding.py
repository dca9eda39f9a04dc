"""Texts -> token ids, on threads of our own: their number is exact, and nothing of them survives into a fork."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.tokenizer import Vocabulary

SMALLEST_PART = 64
PARTS_PER_THREAD = 4


class Encoder:
    """Encodes batches of texts without special tokens; text that spells one, such as "[MASK]", stays text."""

    def __init__(self, vocabulary: Vocabulary, threads: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
        self.threads = threads
        self._tokenizer = vocabulary.tokenizer()
        self._tokenizer.encode_special_tokens = True
        self._pool = ThreadPoolExecutor(threads, "tokenise") if threads > 1 else None

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return all ids in one array, and the number of ids of each text."""
        if not texts:
            return np.zeros(0, self.dtype), np.zeros(0, np.int64)
        if self._pool is None:
            return self._part(texts)
        size = max(SMALLEST_PART, -(-len(texts) // (self.threads * PARTS_PER_THREAD)))
        parts = list(self._pool.map(self._part, [texts[i : i + size] for i in range(0, len(texts), size)]))
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])

    def _part(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(ids, self.dtype, int(lengths.sum())), lengths
