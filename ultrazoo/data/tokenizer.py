"""A tokenizer.json, given or trained: byte-level BPE, which retrains to the same file bit by bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ultrazoo.data.files import locked, write_atomically
from ultrazoo.data.finding import CORPUS
from ultrazoo.data.progress import Progress
from ultrazoo.data.randomness import permutation
from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import ParquetSource, Span
from ultrazoo.errors import ConfigError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<cls>", "<s>", "<|cls|>"),
    "sep": ("[SEP]", "<sep>", "</s>", "<eos>", "<|sep|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}
SHIPPED_VOCAB_SIZE = 8192
SMALLEST_VOCAB_SIZE = len(SPECIALS) + 256
RECIPE = 1
"""Raised when the training recipe changes, so that a tokenizer of an older one is not taken for it."""
TRAINING_BYTES = 64 << 20
READ_ROWS = 1024
SAMPLE = 7


@dataclass(frozen=True)
class Vocabulary:
    """A checked tokenizer: its file's text, the ids of its special tokens and where it came from."""

    text: str
    origin: str
    pad: int
    cls: int
    sep: int
    mask: int
    special_ids: tuple[int, ...]
    size: int

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file's content."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def is_special(self) -> NDArray[np.bool_]:
        """(size,) True at special ids."""
        table = np.zeros(self.size, dtype=bool)
        table[list(self.special_ids)] = True
        return table

    def tokenizer(self, *, special_tokens: bool = True) -> Tokenizer:
        """Return a tokenizer of its own, without truncation or padding.

        Every special token is an added one, so that none is split, also where the file lists it as a plain entry.

        Args:
            special_tokens: Parse the special tokens that a text spells; false: they are text, as in training.
        """
        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        unsplit = [number for number in self.special_ids if number not in added or not added[number].special]
        tokenizer.add_special_tokens([_special(tokenizer, number) for number in unsplit])
        tokenizer.encode_special_tokens = not special_tokens
        return tokenizer


def read_vocabulary(path: Path, vocab_size: int, where: str) -> Vocabulary:
    """Read and check a tokenizer.json.

    Args:
        path: The file.
        vocab_size: Entries of the model's embedding.
        where: Name of the setting, for messages.

    Raises:
        ConfigError: No such file, not a tokenizer, a special token missing, or an id outside the model's vocabulary.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tokenizer = Tokenizer.from_str(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {path} cannot be read ({error}); expected the path of a tokenizer.json") from error
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise ConfigError(
            f"{where}: {path} is not a tokenizer.json of the tokenizers library ({error}); save one with "
            "Tokenizer.save, or leave the field out to train one from the data"
        ) from error
    entries = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(entries.values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"{where}: {path} has {len(entries)} entries with ids up to {largest}, but model.vocab_size is "
            f"{vocab_size}; set model.vocab_size to at least {largest + 1}"
        )
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids, missing = {}, []
    for role, names in NAMES.items():
        name = next((name for known in (added, entries) for name in names if name in known), None)
        if name is None:
            missing.append(" or ".join(names[:2]))
        else:
            ids[role] = entries[name]
    if missing:
        raise ConfigError(
            f"{where}: {path} lacks the special token(s) {', '.join(missing)}; expected all of {', '.join(SPECIALS)}; "
            "add them with Tokenizer.add_special_tokens"
        )
    special = {*added.values(), *ids.values()} | {entries[name] for name in SPECIALS if name in entries}
    vocabulary = Vocabulary(text=text, origin=str(path), special_ids=tuple(sorted(special)), size=largest + 1, **ids)
    _require_mask(vocabulary, where)
    return vocabulary


def _special(tokenizer: Tokenizer, number: int) -> AddedToken:
    """Return a token of the vocabulary as a special one."""
    plain = tokenizer.get_added_tokens_decoder().get(number)
    if plain is None:
        return AddedToken(tokenizer.id_to_token(number), special=True, normalized=False)
    return AddedToken(
        plain.content,
        single_word=plain.single_word,
        lstrip=plain.lstrip,
        rstrip=plain.rstrip,
        normalized=plain.normalized,
        special=True,
    )


def _require_mask(vocabulary: Vocabulary, where: str) -> None:
    """Encode a text with a mask in it and check the ids.

    Raises:
        ConfigError: The text cannot be encoded, or its ids lack the mask.
    """
    tokenizer = vocabulary.tokenizer()
    text = f"a {tokenizer.id_to_token(vocabulary.mask)} b"
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(
            f"{where}: {vocabulary.origin} cannot encode {text!r} ({error}); give its model an unknown token"
        ) from error
    if ids.count(vocabulary.mask) != 1:
        raise ConfigError(
            f"{where}: {vocabulary.origin} encodes {text!r} as {ids}, expected id {vocabulary.mask} of the mask once; "
            "add the mask with Tokenizer.add_special_tokens"
        )


def find_vocabulary(
    source: ParquetSource,
    *,
    given: str | None,
    vocab_size: int,
    cache_dir: Path,
    threads: int,
    console: Callable[[str], None],
) -> Vocabulary:
    """Return the given tokenizer, the shipped one, the one trained earlier, or a new one, in this order.

    Args:
        source: Data to train from.
        given: ``training.tokenizer``.
        vocab_size: Entries of the model's embedding, and of a tokenizer that is trained.
        cache_dir: Folder that keeps trained tokenizers.
        threads: Threads that train.
        console: Takes lines of progress.

    Raises:
        ConfigError: The given tokenizer does not fit, or ``vocab_size`` is too small to train one.
        DataError: The data cannot be read, or the cache not written.
    """
    if given is not None:
        return read_vocabulary(Path(given).expanduser(), vocab_size, "training.tokenizer")
    if source.is_embedded and vocab_size == SHIPPED_VOCAB_SIZE:
        return read_vocabulary(CORPUS / "tokenizer.json", vocab_size, "the embedded corpus")
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size: got {vocab_size}, expected at least {SMALLEST_VOCAB_SIZE} (256 bytes and "
            f"{len(SPECIALS)} special tokens) to train a tokenizer; raise it, or give training.tokenizer"
        )
    facts = json.dumps([RECIPE, TRAINING_BYTES, vocab_size, source.fingerprint])
    name = hashlib.sha256(facts.encode()).hexdigest()[:24]
    path = cache_dir / "tokenizers" / f"{name}.json"
    with locked(path.with_suffix(".lock"), console):
        if not path.exists():
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
            write_atomically(path, train(sample(source, console), vocab_size).to_str(pretty=False).encode())
            console(f"tokenizer: {vocab_size} entries trained from the data, kept at {path}")
    return read_vocabulary(path, vocab_size, "trained tokenizer (delete the file to train it again)")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE on NFC text; the same texts in the same order give the same file.

    Every byte is an entry, so nothing is unknown and accents and case stay. Specials: [PAD] 0, [UNK] 1, [CLS] 2,
    [SEP] 3, [MASK] 4. A word carries the space before it, at the start of a text too.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(name, special=True, lstrip=name == "[MASK]") for name in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        tokenizer.train_from_iterator(texts, trainer)
    finally:
        # set in any case: tokenizers warns at each fork of a process that trained in parallel and left it unset
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def sample(source: ParquetSource, console: Callable[[str], None]) -> Iterator[str]:
    """Yield usable texts up to TRAINING_BYTES, from all over the source: a run of rows from each row group in turn."""
    reader, skipped, taken = RowReader(source, keeping=True), Counter[str](), 0
    progress = Progress("reading text for the tokenizer", source.num_rows, console)
    runs = [
        [Span(unit, start, min(start + READ_ROWS, rows)) for start in range(0, rows, READ_ROWS)]
        for unit, rows in enumerate(source.unit_rows.tolist())
    ]
    runs = [runs[unit] for unit in permutation(len(runs), SAMPLE).tolist()]
    for spans in zip_longest(*runs):
        for span in spans:
            if span is None:
                continue
            texts = [text for text in reader.read(span, None, skipped) if text is not None]
            yield from texts
            size = sum(len(text.encode()) for text in texts)
            progress.add(span.stop - span.start, size)
            taken += size
            if taken >= TRAINING_BYTES:
                return
