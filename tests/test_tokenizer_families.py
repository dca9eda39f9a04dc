"""Every family of tokenizers with every function of texts: masks, words, candidates, vectors, training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizer_parts import FAMILIES, TEXTS, save, vocabulary_of, wordpiece, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close

from ultrazoo.config import config_from_dict
from ultrazoo.data.codec import TextCodec, readable
from ultrazoo.data.encoding import Encoder
from ultrazoo.data.masking import word_table
from ultrazoo.data.tokenizer import read_vocabulary
from ultrazoo.errors import ConfigError
from ultrazoo.inference import load
from ultrazoo.train import train

SENTENCES = ("the king of spain went to sea with a ship", "playing walking dogs, spains kings and the queens.")


@pytest.fixture(params=FAMILIES)
def codec(request: pytest.FixtureRequest, tmp_path: Path) -> TextCodec:
    return TextCodec(vocabulary_of(FAMILIES[request.param](), tmp_path))


def hidden(codec: TextCodec, ids: list[int], place: int) -> str:
    """A text with a mask in place of one of its tokens."""
    spelt = codec.spellings(ids)
    before, own, after = b"".join(spelt[:place]), spelt[place], b"".join(spelt[place + 1 :])
    spaces = b" " * own.startswith(b" "), b" " * own.endswith(b" ")
    return (before + spaces[0] + codec.mask.encode() + spaces[1] + after).decode().strip()


def test_a_mask_gives_the_ids_that_training_sees_where_the_token_is_hidden(codec: TextCodec) -> None:
    compared = 0
    for text in SENTENCES[:1] if codec.vocabulary.size < 31 else SENTENCES:
        (ids,) = codec.heads([text], 200)
        assert not set(ids) & set(codec.vocabulary.special_ids)
        blank = [not spelling.strip() for spelling in codec.spellings(ids)]
        for place, number in enumerate(ids):
            if not blank[place] and not blank[place - 1]:  # a token that is a space: it could be the mask's as well
                expected = [*ids[:place], codec.vocabulary.mask, *ids[place + 1 :]]
                assert codec.masked(hidden(codec, ids, place), 200) == expected, codec.tokenizer.id_to_token(number)
                compared += 1
    assert compared >= 10


def test_masks_beside_masks_spaces_and_punctuation(codec: TextCodec) -> None:
    mask, number = codec.mask, codec.vocabulary.mask
    plain = codec.heads(["the king", "the king, and"], 50)
    for text in (f"{mask} {mask}", f"{mask}{mask}", f" {mask} {mask}"):
        found = codec.masked(text, 50)
        assert found.count(number) == 2
        assert all(not codec.spelling(other).strip() for other in found if other != number)
    assert codec.masked(f"the king {mask}", 50)[: len(plain[0])] == plain[0]
    comma = codec.masked(f"the {mask}, and", 50)
    if codec.vocabulary.size > 40:  # a tokenizer of characters has no word of one token
        assert comma == [*plain[1][:1], number, *plain[1][2:]]
    assert codec.masked(f"the king {mask} of", 4) == codec.masked(f"the king {mask} of", 50)[:4]
    assert codec.masked("[CLS] the king", 50) == codec.heads(["[CLS] the king"], 50)[0]


def test_tokens_spell_the_text_with_a_space_where_a_word_begins(codec: TextCodec) -> None:
    (ids,) = codec.heads(["the king of spain"], 50)
    spelt = codec.spellings(ids)
    assert b"".join(spelt).strip() == b"the king of spain"
    assert [codec.spelling(number) for number in ids] == spelt
    words = [spelling for spelling in spelt if spelling.startswith(b" ") or spelling.endswith(b" ")]
    assert len(words) >= 3
    assert all(codec.spelling(number) == b"" for number in codec.vocabulary.special_ids)
    assert codec.spelling(codec.vocabulary.size) == b""


def test_words_are_the_words_of_the_text(codec: TextCodec) -> None:
    text = SENTENCES[0] if codec.vocabulary.size < 31 else SENTENCES[1]
    (ids,) = codec.heads([text], 200)
    row = np.array([[codec.vocabulary.cls, *ids, codec.vocabulary.sep]])
    starts = word_table(codec.vocabulary).word_starts(row, np.ones_like(row))[0]
    found: list[bytes] = []
    for start, spelling in zip(starts[1:-1], codec.spellings(ids), strict=True):
        if start:
            found.append(b"")
        found[-1] += spelling
    expected = text.replace(",", " ,").replace(".", " .").split()
    assert [word.decode().strip() for word in found] == expected
    assert starts[0] and starts[-1]


def test_the_beginning_of_a_long_text_has_the_ids_of_the_whole(codec: TextCodec) -> None:
    texts = [" ".join(TEXTS), "".join(TEXTS).replace(" ", "") * 3, "\n\n".join(TEXTS), "  ".join(TEXTS), "", "the king"]
    whole = [codec.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for limit in (1, 5, 30):
        assert codec.heads(texts, limit) == [ids[:limit] for ids in whole]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_then_masks_and_vectors(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    pq.write_table(pa.table({"text": TEXTS * 3}), tmp_path / "texts.parquet")
    size = max(tokenizer.get_vocab().values()) + 1
    config = config_from_dict(
        {
            "model": {
                "vocab_size": size,
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "ffn_hidden_size": 16,
                "layer_pattern": ["standard_attn"],
                "dropout": 0.0,
            },
            "training": {
                "local_parquet_dir": str(tmp_path / "texts.parquet"),
                "cache_dir": str(tmp_path / "cache"),
                "tokenizer": str(save(tokenizer, tmp_path)),
                "whole_word_masking": True,
                "max_length": 64,
                "batch_size": 4,
                "max_steps": 3,
                "validation_fraction": 0.1,
                "device": "cpu",
                "kernels": "reference",
            },
        },
        "test",
    )
    result = train(config, run_dir=tmp_path / "run")
    assert result["steps"] == 3 and np.isfinite(result["validation_loss"])
    encoder = load(tmp_path / "run", "cpu")
    mask = tokenizer.id_to_token(encoder.vocabulary.mask)
    (candidates,) = encoder.fill_mask(f"the king of {mask}", top_k=10**6)
    assert len(candidates) == tokenizer.get_vocab_size()
    assert any(candidate.token.strip() == "k" or candidate.token.strip() == "king" for candidate in candidates)
    assert not any("\ufffd" in candidate.token for candidate in candidates)
    vectors = encoder.encode(["the king", f"the {mask}", "the king"])
    assert_close(vectors[0], vectors[2])
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "unigram"]
)  # its model finds its own entries in any text
def test_text_that_spells_a_special_token_is_text_in_training_too(family: str, tmp_path: Path) -> None:
    vocabulary = vocabulary_of(FAMILIES[family](), tmp_path)
    ids, _ = Encoder(vocabulary, threads=1).encode(["the [MASK] of", "the [PAD] of"])
    assert vocabulary.mask not in ids and vocabulary.pad not in ids


def test_a_mask_that_is_a_plain_entry_or_a_plain_added_token_is_never_split(tmp_path: Path) -> None:
    split = FAMILIES["wordpiece_of_a_vocabulary_file"]()
    plain = vocabulary_of(split, tmp_path)
    assert plain.mask not in split.encode("the [MASK] of").ids
    assert plain.mask in plain.tokenizer().encode("the [MASK] of").ids
    assert plain.tokenizer().get_vocab() == split.get_vocab()
    added = wordpiece()
    description = (
        added.to_str().replace('"special":true', '"special":false').replace('"special": true', '"special": false')
    )
    (tmp_path / "tokenizer.json").write_text(description)
    vocabulary = read_vocabulary(tmp_path / "tokenizer.json", added.get_vocab_size(), "test")
    assert vocabulary.mask in vocabulary.tokenizer().encode("the [MASK] of").ids
    assert vocabulary.mask not in vocabulary.tokenizer(special_tokens=False).encode("the [MASK] of").ids


def test_the_registered_mask_is_preferred_to_an_entry_that_looks_like_one(tmp_path: Path) -> None:
    vocab = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "[MASK]", "<mask>", "[UNK]", "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<mask>"])
    assert vocabulary_of(tokenizer, tmp_path).mask == 4


def test_a_tokenizer_that_cannot_encode_a_mask_is_refused(tmp_path: Path) -> None:
    vocab = {name: i for i, name in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    with pytest.raises(ConfigError, match=r"test: .*cannot encode 'a \[MASK\] b' \(.*give its model an unknown token"):
        vocabulary_of(tokenizer, tmp_path)


def test_a_tokenizer_that_forgets_spaces_marks_no_words(tmp_path: Path) -> None:
    letters = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for decoder in (None, decoders.Fuse()):
        tokenizer.decoder = decoder
        with pytest.raises(ConfigError, match=r"training\.whole_word_masking: .*does not mark where words begin"):
            word_table(vocabulary_of(tokenizer, tmp_path))
    word_table(vocabulary_of(words(), tmp_path))


def test_bytes_of_no_whole_character_are_shown_as_numbers(tmp_path: Path) -> None:
    codec = TextCodec(vocabulary_of(FAMILIES["ours"](), tmp_path))
    shown = {readable(codec.spelling(number)) for number in range(codec.vocabulary.size)}
    assert {"<0xE2>", "<0xFF>", " the", "k", " "} <= shown
    assert readable("¿é\ufffd".encode() + b"\xe2\x80") == "¿é\ufffd<0xE2><0x80>"
    fallback = TextCodec(vocabulary_of(FAMILIES["byte_fallback"](), tmp_path))
    assert fallback.spelling(fallback.tokenizer.token_to_id("<0xE2>")) == b"\xe2"
    assert fallback.spelling(fallback.tokenizer.token_to_id("<0x41>")) == b"A"
