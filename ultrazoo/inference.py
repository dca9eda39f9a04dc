"""What a trained encoder is used for: filling masks and turning texts into vectors."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ultrazoo.arguments import file_path, list_of, whole_number
from ultrazoo.config import Config, config_from_dict
from ultrazoo.data.codec import TextCodec, readable
from ultrazoo.data.tokenizer import Vocabulary, read_vocabulary
from ultrazoo.errors import ArgumentTypeError, CheckpointError, DataError
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.train.checkpoint import CONFIG, TOKENIZER, load_model, read_config, verify_weights
from ultrazoo.train.durable import MANIFEST
from ultrazoo.train.runtime import pick_device
from ultrazoo.train.store import read_pointer

log = logging.getLogger("ultrazoo")


class TextError(DataError, ValueError):
    """A text cannot be used for what was asked."""

    exit_code = 2


@dataclass(frozen=True)
class Candidate:
    """A token for a masked place.

    ``token`` is what it adds to the text: with a space in front where it begins a word, and bytes that are no whole
    character as ``<0xE2>``.
    """

    token: str
    probability: float
    token_id: int


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path means: itself, or the best of a run folder, else its latest.

    Raises:
        CheckpointError: There is none, or the run folder names one that is not inside it.
        ArgumentError: It is no path.
    """
    path = file_path("path", path)
    if (path / MANIFEST).is_file():
        return path
    for name in ("best", "latest"):
        if (named := read_pointer(path / "checkpoints", name)) is not None:
            return named
    state = "holds no checkpoint" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {state}; expected a run folder such as runs/embbert, or one of its checkpoints")


def load(path: str | Path, device: str | torch.device = "auto") -> Encoder:
    """Load a trained encoder from a run folder or a checkpoint.

    Weights, config and tokenizer are checked against the manifest; the other files are not read, and may be missing.

    Args:
        path: Run folder (its best checkpoint is taken, or its latest if none was validated) or checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or its weights do not fit its config.
        ConfigError: Its config needs a plugin that is not installed, or the device is unknown or not there.
        ArgumentError: The path is not one.
    """
    wanted = pick_device(device, "device")
    folder = find_checkpoint(path)
    verify_weights(folder)
    config = config_from_dict(read_config(folder), str(folder / CONFIG))
    vocabulary = read_vocabulary(folder / TOKENIZER, config.model.vocab_size, "tokenizer")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        model = build_model(config.model)
    load_model(folder, model)
    return Encoder(model.to(wanted), vocabulary, config)


class Encoder:
    """A trained model with its tokenizer; threads may share it.

    Args:
        model: The model; it is put into evaluation mode.
        vocabulary: Its tokenizer.
        config: What it was trained with; texts are cut at its ``training.max_length`` tokens.
    """

    def __init__(self, model: MaskedLM, vocabulary: Vocabulary, config: Config) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.config = config
        self.device = next(model.parameters()).device
        self._codec = TextCodec(vocabulary)
        self._tokenizer = self._codec.tokenizer
        names = (self._tokenizer.id_to_token(number) for number in range(vocabulary.size))
        self._unknown = torch.tensor([name is None for name in names], device=self.device)
        self._room = config.training.max_length - 2

    @torch.inference_mode()
    def fill_mask(self, text: str, top_k: int = 5) -> list[list[Candidate]]:
        """Return the ``top_k`` likeliest tokens of each mask in the text, in reading order, likeliest first.

        Every mask is filled on its own, from the text as given. The model sees the ids that it sees in training where
        a token is hidden: the space before a mask belongs to the hidden word. Text that spells a special token other
        than the mask is text.

        Args:
            text: The text, with at least one mask.
            top_k: Candidates per mask; no more than the tokenizer has tokens.

        Raises:
            TextError: The text has no mask, or one beyond ``training.max_length`` tokens, or is not valid Unicode.
            ArgumentError: An argument has another type, or ``top_k`` is below 1.
        """
        count = min(whole_number("top_k", top_k, least=1), int(self._unknown.logical_not().sum()))
        require_text("text", text)
        mask = self._codec.mask
        if mask not in text:
            raise TextError(
                f"text: got {reprlib.repr(text)} without {mask}, expected at least one, as in 'The king of {mask}'"
            )
        (ids,) = self._cut([self._codec.masked(text, self._room + 1)])
        if ids.count(self.vocabulary.mask) < text.count(mask):
            raise TextError(
                f"text: a {mask} stands beyond the first {self._room + 2} tokens (training.max_length); shorten the "
                "text"
            )
        token_ids = torch.tensor([self._framed(ids)], device=self.device)  # (1, L)
        labels = token_ids.masked_fill(token_ids.ne(self.vocabulary.mask), IGNORED)
        shares = self.model(token_ids, labels=labels).logits.float().softmax(-1)  # (M, V)
        best = shares[:, : self.vocabulary.size].masked_fill(self._unknown, -1).topk(count)
        return [
            [
                Candidate(self._text_of(token), probability, token)
                for token, probability in zip(tokens, probabilities, strict=True)
            ]
            for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def encode(self, texts: Iterable[str], batch_size: int = 32) -> Tensor:
        """Return the mean of each text's last hidden states, [CLS] and [SEP] included.

        A text's vector does not depend on the texts beside it. Texts are cut at ``training.max_length`` tokens, with a
        warning. Text that spells a special token, such as "[MASK]", is text (except to a Unigram tokenizer, whose model
        finds its own entries in any text).

        Args:
            texts: n texts.
            batch_size: Texts at once.

        Returns:
            (n, D) fp32 on the CPU.

        Raises:
            TextError: A text is not valid Unicode; the message has its index.
            ArgumentError: ``texts`` is one str and no list, something in it is no str, or ``batch_size`` is below 1.
        """
        size = whole_number("batch_size", batch_size, least=1)
        items = list_of("texts", texts, "texts")
        for place, text in enumerate(items):
            require_text(f"texts[{place}]", text)
        vectors = torch.empty(len(items), self.config.model.hidden_size)
        rows = self._tokenize(items)
        for places in _alike(rows, size):
            lengths = torch.tensor([len(rows[place]) for place in places])
            segments = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # (B, L)
            token_ids = torch.full(segments.shape, self.vocabulary.pad)
            token_ids[segments.bool()] = torch.tensor([token for place in places for token in rows[place]])
            hidden = self.model.encode(token_ids.to(self.device), segments.to(self.device))  # (B, L, D), zero at pads
            vectors[places] = hidden.float().sum(1).cpu() / lengths[:, None]
        return vectors

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text between [CLS] and [SEP], cut at ``training.max_length``."""
        return [self._framed(ids) for ids in self._cut(self._codec.heads(texts, self._room + 1))]

    def _cut(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """Return rows of ids without what [CLS] and [SEP] leave no room for, with a warning."""
        if cut := sum(len(ids) > self._room for ids in rows):
            log.warning(
                "%d of %d text(s) are longer than %d tokens (training.max_length) and lose their ends",
                cut,
                len(rows),
                self._room + 2,
            )
        return [ids[: self._room] for ids in rows]

    def _framed(self, ids: list[int]) -> list[int]:
        return [self.vocabulary.cls, *ids, self.vocabulary.sep]

    def _text_of(self, token_id: int) -> str:
        if token_id in self.vocabulary.special_ids:
            return str(self._tokenizer.id_to_token(token_id))
        return readable(self._codec.spelling(token_id))


def require_text(where: str, text: object) -> None:
    """Require a str that UTF-8 can hold.

    Raises:
        ArgumentTypeError: It is no str.
        TextError: It holds a lone surrogate, which stands for no character, or for a byte that was not UTF-8.
    """
    if not isinstance(text, str):
        hint = "; decode it first" if isinstance(text, bytes) else ""
        raise ArgumentTypeError(f"{where}: got {type(text).__name__} {reprlib.repr(text)}, expected str{hint}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = 0xDC80 <= code <= 0xDCFF  # what surrogateescape makes of it
        found = f"byte 0x{code - 0xDC00:02X}, which is not UTF-8," if byte else f"a lone surrogate U+{code:04X}"
        raise TextError(
            f"{where}: got {found} at character {error.start}, expected text; "
            "repair it, for example with text.encode(errors='replace').decode()"
        ) from error


def _alike(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of ``batch_size`` rows at a time, rows of similar length together."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
