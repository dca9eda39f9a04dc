"""Masked language modelling: 80 % [MASK], 10 % a random token, 10 % kept, drawn anew for each epoch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.randomness import U64, draws
from ultrazoo.data.tokenizer import Vocabulary
from ultrazoo.errors import ConfigError

NOT_A_TARGET = -100
MASKED, REPLACED = 0.8, 0.9
SECOND_STREAM = 1 << 32


@dataclass(frozen=True)
class WordTable:
    """What a token says about words: ``starts``, it begins one itself; ``ends``, whatever follows begins one."""

    starts: NDArray[np.bool_]
    ends: NDArray[np.bool_]

    def word_starts(self, ids: NDArray[Any], segments: NDArray[Any]) -> NDArray[np.bool_]:
        """Return (B, L), True at the first token of each word; documents and special tokens part words."""
        starts = self.starts[ids]
        starts[:, 0] = True
        starts[:, 1:] |= self.ends[ids[:, :-1]] | (segments[:, 1:] != segments[:, :-1])
        return starts


def word_table(vocabulary: Vocabulary) -> WordTable:
    """Read from a tokenizer which tokens begin a word.

    WordPiece marks continuations (``##``), byte-level BPE and Metaspace mark the space before a word; there, digits
    and letters go on with a word and anything else stands alone, so that ``king,`` is two.

    Raises:
        ConfigError: The tokenizer marks neither.
    """
    description = json.loads(vocabulary.text)
    tokenizer = vocabulary.tokenizer()
    tokens = [tokenizer.id_to_token(number) or "" for number in range(vocabulary.size)]
    starts, ends = vocabulary.is_special.copy(), vocabulary.is_special.copy()
    parts = json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
    if description["model"]["type"] == "WordPiece":
        prefix = description["model"].get("continuing_subword_prefix") or "##"
        starts |= np.array([not token.startswith(prefix) for token in tokens])
        return WordTable(starts, ends)
    if '"ByteLevel"' in parts:
        spaces: tuple[str, ...] = ("Ġ", "Ċ", "ĉ", "č")
        text = {number: tokenizer.decode([number], skip_special_tokens=False) for number in range(vocabulary.size)}
    elif '"Metaspace"' in parts:
        spaces = ("▁",)
        text = dict(enumerate(tokens))
    else:
        raise ConfigError(
            f"training.whole_word_masking: the tokenizer {vocabulary.origin} does not mark where words begin; expected "
            "WordPiece, byte-level BPE or Metaspace; set whole_word_masking to false, or give such a tokenizer"
        )
    for number, token in enumerate(tokens):
        decoded = text[number].lstrip(" ▁")
        # part of a character's bytes, decoded alone, is U+FFFD: it goes on with what stands before
        starts[number] |= token.startswith(spaces) or not _in_word(decoded[:1])
        ends[number] |= decoded != "" and not _in_word(decoded[-1:])
    return WordTable(starts, ends)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "�"


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

    def __init__(self, vocabulary: Vocabulary, probability: float, words: WordTable | None = None) -> None:
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
