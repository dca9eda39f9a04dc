"""Masked language modelling: 80 % [MASK], 10 % a random token, 10 % kept, drawn anew for each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.randomness import U64, draws
from ultrazoo.data.space_words import SpaceWords
from ultrazoo.data.tokenizer import Vocabulary
from ultrazoo.data.words import Words

NOT_A_TARGET = -100
MASKED, REPLACED = 0.8, 0.9
SECOND_STREAM = 1 << 32


class WordRule(Protocol):
    """Parts the tokens of rows into words."""

    def word_starts(self, ids: NDArray[Any], segments: NDArray[Any]) -> NDArray[np.bool_]:
        """Return (B, L), True at the first token of each word; documents and special tokens part words."""


WORD_RULES: dict[int, Callable[[Vocabulary], WordRule]] = {1: SpaceWords, 2: Words}
"""Revision of the rule -> the rule. A run keeps the revision that it began with, since its targets depend on it."""
WORD_RULE = max(WORD_RULES)


def word_table(vocabulary: Vocabulary, revision: int = WORD_RULE) -> WordRule:
    """Return a rule for the words of a tokenizer.

    Raises:
        ConfigError: The tokenizer does not mark where words begin.
    """
    return WORD_RULES[revision](vocabulary)


class Masker:
    """Chooses targets and hides them; vectorised over a batch.

    A token (or, with ``words``, every token of a word) is a target with probability ``probability``, independently, so
    that the share of targets is exact on average. [CLS], [SEP] and padding never are. Replacements are drawn from all
    ids but the special ones; a kept token is a target like the others.

    Args:
        vocabulary: Special ids and size.
        probability: Share of tokens to predict.
        words: Where words begin, to mask whole ones.
    """

    def __init__(self, vocabulary: Vocabulary, probability: float, words: WordRule | None = None) -> None:
        self.probability, self.words = probability, words
        self._below = np.uint64(math.ceil(probability * 2**53) << 11)
        """A draw is below it as often as its upper 53 bits, as a fraction, are below ``probability``."""
        self._mask_id = vocabulary.mask
        self._is_special = vocabulary.is_special
        self._ordinary = np.flatnonzero(~vocabulary.is_special)

    def __call__(
        self, ids: NDArray[Any], segments: NDArray[Any], states: U64
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``(input_ids, labels)``, both (B, L); labels are -100 where nothing is to be predicted.

        Args:
            ids: (B, L) tokens.
            segments: (B, L), 0 at padding.
            states: (B,) random stream of each row; nothing else is random.
        """
        length = ids.shape[1]
        columns = np.arange(length)
        bits = draws(states[:, None], columns)
        if self.words is not None:
            first = np.where(self.words.word_starts(ids, segments), columns, 0)
            bits = np.take_along_axis(bits, np.maximum.accumulate(first, axis=1), axis=1)
        place = np.flatnonzero(bits < self._below)  # in the flattened (B, L), as all that follows
        original = ids.reshape(-1)[place].astype(np.int64)
        chosen = (segments.reshape(-1)[place] > 0) & ~self._is_special[original]
        place, original = place[chosen], original[chosen]
        inputs = ids.astype(np.int64)
        labels = np.full_like(inputs, NOT_A_TARGET)
        labels.reshape(-1)[place] = original
        row, column = np.divmod(place, length)
        bits = draws(states[row], column + SECOND_STREAM)
        action = (bits >> np.uint64(32)).astype(np.float64) * 2.0**-32
        pick = ((bits & np.uint64(0xFFFFFFFF)) * np.uint64(len(self._ordinary))) >> np.uint64(32)
        hidden = np.where(action < MASKED, self._mask_id, self._ordinary[pick])
        inputs.reshape(-1)[place] = np.where(action < REPLACED, hidden, original)
        return inputs, labels
