"""Revision 1 of the rule for words, which runs that began with it keep: words are parted by spaces and punctuation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.tokenizer import Vocabulary
from ultrazoo.errors import ConfigError


class SpaceWords:
    """Reads from each token alone whether it begins a word, or ends one whatever follows.

    WordPiece marks continuations (``##``), byte-level BPE and Metaspace mark the space before a word; there, digits
    and letters continue a word and anything else is alone, so that ``king,`` is two.

    Args:
        vocabulary: The tokenizer.

    Raises:
        ConfigError: The tokenizer marks neither.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.starts, self.ends = vocabulary.is_special.copy(), vocabulary.is_special.copy()
        description = json.loads(vocabulary.text)
        tokenizer = vocabulary.tokenizer()
        tokens = [tokenizer.id_to_token(number) or "" for number in range(vocabulary.size)]
        parts = json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
        if description["model"]["type"] == "WordPiece":
            prefix = description["model"].get("continuing_subword_prefix") or "##"
            self.starts |= np.array([not token.startswith(prefix) for token in tokens])
            return
        if '"ByteLevel"' in parts:
            spaces: tuple[str, ...] = ("Ġ", "Ċ", "ĉ", "č")
            text = {number: tokenizer.decode([number], skip_special_tokens=False) for number in range(vocabulary.size)}
        elif '"Metaspace"' in parts:
            spaces = ("▁",)
            text = dict(enumerate(tokens))
        else:
            raise ConfigError(
                f"training.whole_word_masking: the tokenizer {vocabulary.origin} does not mark where words begin; "
                "expected WordPiece, byte-level BPE or Metaspace; set whole_word_masking to false, or give such a "
                "tokenizer"
            )
        for number, token in enumerate(tokens):
            decoded = text[number].lstrip(" ▁")
            # part of a character's bytes, decoded alone, is U+FFFD: it continues what is before it
            self.starts[number] |= token.startswith(spaces) or not _in_word(decoded[:1])
            self.ends[number] |= decoded != "" and not _in_word(decoded[-1:])

    def word_starts(self, ids: NDArray[Any], segments: NDArray[Any]) -> NDArray[np.bool_]:
        """Return (B, L), True at the first token of each word; documents and special tokens part words."""
        starts = self.starts[ids]
        starts[:, 0] = True
        starts[:, 1:] |= self.ends[ids[:, :-1]] | (segments[:, 1:] != segments[:, :-1])
        return starts


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "\ufffd"
