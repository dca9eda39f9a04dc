"""Texts -> ids as training sees them, and ids -> the text that each spells; for any tokenizer of the library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from tokenizers import Encoding, decoders

from ultrazoo.data.tokenizer import Vocabulary

CHARACTERS_PER_TOKEN = 16
"""A long text is tokenised from its beginning on, at first so many characters per token that is wanted."""
ANCHORS = 64
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
LOST = "\ufffd"


class TextCodec:
    """A tokenizer whose special tokens are text, as in training; nothing in it changes, so threads may share it.

    Args:
        vocabulary: The tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = vocabulary.tokenizer(special_tokens=False)
        self.tokenizer.post_processor = None  # it would add tokens, or trim the offsets
        model = json.loads(vocabulary.text)["model"]
        self._word_end = str(model.get("end_of_word_suffix") or "")
        if self.tokenizer.decoder is None:
            self._choose_decoder(str(model.get("continuing_subword_prefix") or "##"))

    @property
    def mask(self) -> str:
        """How a text spells the mask."""
        return str(self.tokenizer.id_to_token(self.vocabulary.mask))

    def heads(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Return the first ``limit`` ids of each text; of a long text only the beginning is tokenised."""
        return [ids[:limit] for _, ids in self._beginnings(texts, limit)]

    def masked(self, text: str, limit: int) -> list[int]:
        """Return the first ``limit`` ids of a text with masks in it.

        They are those of a text with a word or a part of one at each mask, and the mask in place of its tokens, as in
        training: a space before a mask is the word's, and what is attached to a mask is not the start of a text.
        """
        ids: list[int] = []
        pieces = text.split(self.mask)
        for place, piece in enumerate(pieces):
            if len(ids) < limit:
                (start, _), *_ = self._beginnings([piece], limit)
                ids += self._between(start, follows=place > 0, ends=place == len(pieces) - 1 or start != piece)
                ids += [self.vocabulary.mask] * (place < len(pieces) - 1)
        return ids[:limit]

    def spelling(self, number: int) -> bytes:
        """Return what a token adds to a text in UTF-8: with a space in front if it begins a word; part of a character.

        A special token, and an id that the tokenizer does not have, add nothing.
        """
        return self.spellings([number])[0]

    def spellings(self, numbers: Sequence[int]) -> list[bytes]:
        """Return the spelling of each token."""
        anchor = [number for _, number in self._anchors[:1]]
        before = self._decode(anchor)
        both = self.tokenizer.decode_batch([[*anchor, number] for number in numbers], skip_special_tokens=False)
        return [self._spelling(number, before, text) for number, text in zip(numbers, both, strict=True)]

    @property
    def marks_words(self) -> bool:
        """Whether tokens keep where words begin: whether ids with a space between two words differ from those without.

        False too where the spellings of the tokens do not give the text again.
        """
        words = [word for word, _ in self._anchors[:8]]
        for word in words:
            spaced = f"{words[0]} {word}"
            ids = self._ids(spaced)
            if ids == self._ids(words[0] + word) or b"".join(self.spellings(ids)).strip() != spaced.encode():
                return False
        return bool(words)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _spelling(self, number: int, before: str, both: str) -> bytes:
        token = self.tokenizer.id_to_token(number)
        if token is None or number in self.vocabulary.special_ids:
            return b""
        if self._word_end:
            return re.sub(f"{re.escape(self._word_end)}$", " ", token).encode()
        text = both.removeprefix(before) if both.startswith(before) else self._decode([number])
        if LOST not in text or LOST in token:
            return text.encode()
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        if all(letter in BYTE_OF for letter in token):
            return bytes(BYTE_OF[letter] for letter in token)
        return text.encode()

    def _beginnings(self, texts: Sequence[str], limit: int) -> list[tuple[str, list[int]]]:
        """Return a beginning of each text with its ids, the first ``limit`` of which are those of the whole text.

        They are when the text ends there, or when twice as much of it gives the same ones.
        """
        found: list[tuple[str, list[int]]] = [("", [])] * len(texts)
        pending, size = list(range(len(texts))), CHARACTERS_PER_TOKEN * limit
        while pending:
            starts = [_start(texts[place], size) for place in pending]
            unsettled = []
            for place, start, encoding in zip(pending, starts, self._encode(starts), strict=True):
                ids, earlier = encoding.ids, found[place][1]
                found[place] = (start, ids)
                if start != texts[place] and (len(earlier) < limit or ids[:limit] != earlier[:limit]):
                    unsettled.append(place)
            pending, size = unsettled, 2 * size
        return found

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def _between(self, piece: str, *, follows: bool, ends: bool) -> list[int]:
        """Return the ids of a piece of text beside words that are hidden by a mask.

        Args:
            piece: The piece.
            follows: A mask is before it.
            ends: No mask is after it.
        """
        spaced = not piece or piece[-1].isspace()
        precedes = not ends and (spaced or bool(self._word_end))
        if not follows and not precedes:
            return self._ids(piece)
        for word, _ in self._anchors:
            text = word * follows + piece + word * precedes
            start = len(word) * follows
            stop = start + len(piece)
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            own, apart = [], True
            for number, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
                if last > stop:
                    apart &= first >= start and not text[first:stop].strip()
                elif first >= start:
                    own.append(number)
                else:
                    apart &= last <= start
            if apart:
                return own
        return self._ids(piece)

    @cached_property
    def _anchors(self) -> list[tuple[str, int]]:
        """Words of one token that a space parts from what is before, with the id of that token after a space.

        Those whose token takes the space with it come first, if there are any, alone.
        """
        joined: list[tuple[str, int]] = []
        apart: list[tuple[str, int]] = []
        for number in range(self.vocabulary.size):
            word = self._decode([number]).strip()
            if self.vocabulary.is_special[number] or not word.isalnum():
                continue
            encoding = self.tokenizer.encode(f"{word} {word}", add_special_tokens=False)
            if len(encoding.ids) < 2 or self.vocabulary.is_special[encoding.ids[-1]]:
                continue
            (_, before), (first, _) = encoding.offsets[-2:]
            if before <= first and len(word) <= first <= len(word) + 1:
                (joined if before <= len(word) else apart).append((word, encoding.ids[-1]))
            if len(joined) == ANCHORS:
                break
        return joined or apart

    def _choose_decoder(self, prefix: str) -> None:
        """Give a tokenizer without a decoder the first one that gives two words again."""
        for decoder in (
            decoders.WordPiece(prefix, cleanup=False),
            decoders.Fuse(),
            decoders.Metaspace(),
            decoders.ByteLevel(),
            decoders.BPEDecoder(),
        ):
            self.tokenizer.decoder = decoder
            self.__dict__.pop("_anchors", None)
            for word, _ in self._anchors[:1]:
                if self._decode(self._ids(f"{word} {word}")).strip() == f"{word} {word}":
                    return
        self.tokenizer.decoder = None
        self.__dict__.pop("_anchors", None)


def readable(spelling: bytes) -> str:
    """Return a token's spelling as text; bytes that are no whole character become ``<0xE2>``."""
    text = spelling.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)


def _start(text: str, size: int) -> str:
    """Return the beginning of a text up to a space within ``size`` characters, if there is one in the second half."""
    if len(text) <= size:
        return text
    start = text[:size]
    words = start.rsplit(None, 1)
    return words[0] if len(words) == 2 and len(words[0]) >= size // 2 else start


def _byte_alphabet() -> Iterable[tuple[str, int]]:
    """Yield the letters of byte-level tokens with their bytes: printable bytes stand for themselves."""
    shifted = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte), byte
        else:
            yield chr(shifted), byte
            shifted += 1


BYTE_OF = dict(_byte_alphabet())
