"""A small tokenizer of every family, trained on the same texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ultrazoo.data.tokenizer import Vocabulary, read_vocabulary
from ultrazoo.data.tokenizer import train as train_bpe

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCE = "the king of spain went to sea with a ship and queen who reads old books playing walking singing dogs"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) + ", and so on." for i in range(len(WORDS))] + ["abcdefghijklmnopqrstuvwxyz"]


def byte_level(*, lstrip: bool = True, prefix: bool = False) -> Tokenizer:
    """Byte-level BPE as GPT-2's or RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[AddedToken(name, special=True, lstrip=lstrip and name == "[MASK]") for name in SPECIALS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    """WordPiece as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def wordpiece_of_a_vocabulary_file() -> Tokenizer:
    """WordPiece made of a vocab.txt alone: [MASK] is an entry like any other, and there is no decoder."""
    trained = wordpiece()
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram with Metaspace, as SentencePiece has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE over whole texts with a token for each byte, as Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # merges are learned within words, as SentencePiece does; afterwards nothing parts the words
    by_word = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_word, pre_tokenizers.Punctuation()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS + fallback, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = None
    description["added_tokens"] = description["added_tokens"][: len(SPECIALS)]
    return Tokenizer.from_str(json.dumps(description))


def suffixed() -> Tokenizer:
    """BPE that marks the end of a word, as CLIP's."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def characters() -> Tokenizer:
    """A token per character, spaces too, without a decoder."""
    alphabet = [*SPECIALS, *sorted({letter for text in TEXTS for letter in text})]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(alphabet)}, [], unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def words() -> Tokenizer:
    """A token per word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False))
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "ours": lambda: train_bpe(iter(TEXTS), 400),
    "byte_level": byte_level,
    "byte_level_without_lstrip": lambda: byte_level(lstrip=False, prefix=True),
    "wordpiece": wordpiece,
    "wordpiece_of_a_vocabulary_file": wordpiece_of_a_vocabulary_file,
    "unigram": unigram,
    "byte_fallback": byte_fallback,
    "suffixed": suffixed,
    "characters": characters,
    "words": words,
}


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a tokenizer's file and return its path."""
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return path


def vocabulary_of(tokenizer: Tokenizer, folder: Path) -> Vocabulary:
    """Return a tokenizer as the package reads it."""
    size = max(tokenizer.get_vocab().values()) + 1
    return read_vocabulary(save(tokenizer, folder), size, "test")
