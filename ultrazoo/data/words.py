"""Where words begin, for whole-word masking: read from the characters that the tokens of a row spell."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.codec import TextCodec
from ultrazoo.data.packing import before, ragged
from ultrazoo.data.tokenizer import Vocabulary
from ultrazoo.errors import ConfigError

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # CJK radicals and signs, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # more Bopomofo, CJK strokes, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),  # more Myanmar
    (0xAA60, 0xAADF),  # more Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # Han, for compatibility
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x16FE0, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B2FF),  # more Kana, Nushu
    (0x20000, 0x3FFFF),  # Han
)
"""First and last code points of the scripts that put no space between words."""
LONGEST = 32
"""Characters after which a word without an end, such as a DNA sequence, is cut."""
APART, LETTER, SIGN, MARK, SPACE = range(5)
"""Kinds of characters: alone; of a word; a word of its own; joined to the one before; at the start of a word."""
JOINERS = "\u200c\u200d"
TABLED, SELECTORS = 0x20000, 0xE0000
"""Beyond the first are Han, and beyond the second the marks that select a variant of one."""


def is_unspaced(letter: str) -> bool:
    """Return whether a letter is of a script that puts no space between words."""
    code = ord(letter)
    return unicodedata.category(letter)[0] in "LN" and any(first <= code <= last for first, last in UNSPACED)


class Words:
    """Parts the tokens of a row into words.

    A word is a run of letters, digits and the marks on them, at most ``LONGEST`` long, with the space before it. In
    scripts without spaces between words it is one letter with its marks, as in BERT. Anything else is alone: ``king,``
    is two words. A token belongs to the word of the character that it begins with, or begins in the middle of, so that
    a token is never cut; a special token and the start of a document part words.

    Args:
        vocabulary: The tokenizer.

    Raises:
        ConfigError: Its tokens do not keep where words begin.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        codec = TextCodec(vocabulary)
        if not codec.marks_words:
            raise ConfigError(
                f"training.whole_word_masking: the tokenizer {vocabulary.origin} does not mark where words begin; "
                "expected one that encodes 'a b' and 'ab' differently, and decodes them; set whole_word_masking to "
                "false, or give such a tokenizer"
            )
        spellings = codec.spellings(range(vocabulary.size))
        self._is_special = vocabulary.is_special
        # special tokens, and one more that ends each row, spell something that is no part of a word or character
        plain = [b"\n" if special else text for special, text in zip(self._is_special, spellings, strict=True)]
        self._end = len(plain)
        plain.append(b"\n")
        self._sizes = np.array([len(text) for text in plain])
        self._starts = before(self._sizes)
        self._bytes = np.frombuffer(b"".join(plain), np.uint8)

    def word_starts(self, ids: NDArray[Any], segments: NDArray[Any]) -> NDArray[np.bool_]:
        """Return (B, L), True at the first token of each word.

        Args:
            ids: (B, L) tokens.
            segments: (B, L) document numbers.
        """
        tokens = np.pad(ids.astype(np.int64), ((0, 0), (0, 1)), constant_values=self._end)  # (B, L + 1)
        sizes = self._sizes[tokens.reshape(-1)]
        firsts = before(sizes)
        text = self._bytes[ragged(self._starts[tokens.reshape(-1)], sizes)]
        whole = (text & 0xC0) != 0x80  # bytes that begin a character
        place = np.flatnonzero(whole)
        opens_token = np.zeros(len(text), dtype=bool)
        opens_token[firsts[sizes > 0]] = True
        begins = np.zeros(len(text) + 1, dtype=bool)
        begins[place] = _word_starts(_kinds(text, place), opens_token[place])
        starts = np.where(sizes > 0, begins[firsts], False).reshape(tokens.shape)[:, :-1]
        special = self._is_special[ids]
        starts |= special
        starts[:, 0] = True
        starts[:, 1:] |= special[:, :-1] | (segments[:, 1:] != segments[:, :-1])
        return starts


def _word_starts(kinds: NDArray[np.uint8], opens_token: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (n,), True at characters that begin a word.

    Args:
        kinds: (n,) kind of each character.
        opens_token: (n,) True where a character is the first of its token: a space there is that of the next word.
    """
    order = np.arange(len(kinds))
    base = np.maximum.accumulate(np.where(kinds == MARK, 0, order))  # the character that a mark is on
    previous = kinds[base[:-1]]
    begins = np.ones(len(kinds), dtype=bool)
    opener = (previous == SPACE) & opens_token[base[:-1]]
    joined = (kinds[1:] == LETTER) & (previous == LETTER) | opener & (kinds[1:] != SPACE) | (kinds[1:] == MARK)
    begins[1:] = ~joined
    age = order - np.maximum.accumulate(np.where(begins, order, 0))
    return begins | (kinds == LETTER) & (age > 0) & (age % LONGEST == 0)


def _kinds(text: NDArray[np.uint8], place: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the kind of each character of UTF-8 text; one that is cut off counts as the first that it could be.

    Args:
        text: (bytes,).
        place: (n,) where characters begin.
    """
    code = text[place].astype(np.int64)
    wide = np.flatnonzero(code >= 0x80)
    lead, byte_place = code[wide], place[wide]
    extra = 1 + (lead >= 0xE0) + (lead >= 0xF0)
    padded, intact = np.pad(text, (0, 3)), np.ones(len(wide), dtype=bool)
    value = lead & (0x3F >> extra)
    for nth in (1, 2, 3):
        byte = padded[byte_place + nth]
        intact &= (byte & 0xC0) == 0x80
        value = np.where(nth > extra, value, value << 6 | np.where(intact, byte & 0x3F, 0))
    code[wide] = value
    return _table()[np.minimum(code, TABLED) + (code >= SELECTORS)]


@cache
def _table() -> NDArray[np.uint8]:
    """Return the kind of each code point below ``TABLED``, and then that of those beyond, and of the selectors."""
    return np.array([*(_kind(chr(code)) for code in range(TABLED)), SIGN, MARK], np.uint8)


def _kind(letter: str) -> int:
    category = unicodedata.category(letter)
    if letter == " ":
        return SPACE
    if category[0] == "M" or letter in JOINERS:
        return MARK
    if is_unspaced(letter):
        return SIGN
    return LETTER if letter.isalnum() else APART
