"""What a trained encoder is used for: filling masks and turning texts into vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ultrazoo.config import Config, config_from_dict
from ultrazoo.data.tokenizer import Vocabulary, read_vocabulary
from ultrazoo.errors import CheckpointError, DataError
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.train.checkpoint import CONFIG, TOKENIZER, load_model, read_config, verify_checkpoint
from ultrazoo.train.durable import MANIFEST
from ultrazoo.train.runtime import pick_device
from ultrazoo.train.store import read_pointer

log = logging.getLogger("ultrazoo")


class TextError(DataError):
    """A text cannot be used for what was asked."""

    exit_code = 2


@dataclass(frozen=True)
class Candidate:
    """A token for a masked place; ``token`` begins with a space where it begins a word."""

    token: str
    probability: float
    token_id: int


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the best of a run folder, else its latest.

    Raises:
        CheckpointError: There is none, or the run folder names one that is not inside it.
    """
    if (path / MANIFEST).is_file():
        return path
    for name in ("best", "latest"):
        if (named := read_pointer(path / "checkpoints", name)) is not None:
            return named
    state = "holds no checkpoint" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {state}; expected a run folder such as runs/embbert, or one of its checkpoints")


def load(path: str | Path, device: str = "auto") -> Encoder:
    """Load a trained encoder from a run folder or a checkpoint, after checking its files against their manifest.

    Args:
        path: Run folder (its best checkpoint is taken, or its latest if none was validated) or checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or its weights do not fit its config.
        ConfigError: Its config needs a plugin that is not installed, or the device is not there.
    """
    folder = find_checkpoint(Path(path))
    verify_checkpoint(folder)
    config = config_from_dict(read_config(folder), str(folder / CONFIG))
    vocabulary = read_vocabulary(folder / TOKENIZER, config.model.vocab_size, "tokenizer")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        model = build_model(config.model)
    load_model(folder, model)
    return Encoder(model.to(pick_device(device)), vocabulary, config)


class Encoder:
    """A trained model with its tokenizer.

    Args:
        model: The model; it is put into evaluation mode.
        vocabulary: Its tokenizer.
        config: What it was trained with; texts are cut at its ``training.max_length`` tokens.
    """

    def __init__(self, model: MaskedLM, vocabulary: Vocabulary, config: Config) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.config = config
        self._tokenizer = vocabulary.tokenizer()
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def fill_mask(self, text: str, top_k: int = 5) -> list[list[Candidate]]:
        """Return the ``top_k`` likeliest tokens of each mask in the text, in reading order, likeliest first.

        Every mask is filled on its own, from the text as given.

        Raises:
            TextError: The text has no mask, or one beyond ``training.max_length`` tokens.
        """
        mask = str(self._tokenizer.id_to_token(self.vocabulary.mask))
        if mask not in text:
            raise TextError(f"text: got {text!r} without {mask}, expected at least one, as in 'The king of {mask}'")
        token_ids = torch.tensor(self._tokenize([text], special_tokens=True), device=self.device)  # (1, L)
        labels = token_ids.masked_fill(token_ids.ne(self.vocabulary.mask), IGNORED)
        if int(labels.ne(IGNORED).sum()) < text.count(mask):
            raise TextError(
                f"text: a {mask} stands beyond the first {self.config.training.max_length} tokens "
                "(training.max_length); shorten the text"
            )
        logits = self.model(token_ids, labels=labels).logits  # (M, V)
        best = logits.float().softmax(-1).topk(min(top_k, self.vocabulary.size))
        return [
            [
                Candidate(self._text_of(token), probability, token)
                for token, probability in zip(ids, shares, strict=True)
            ]
            for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Return the mean of each text's last hidden states, [CLS] and [SEP] included.

        A text's vector does not depend on the texts beside it. Texts are cut at ``training.max_length`` tokens, with a
        warning. Text that spells a special token, such as "[MASK]", is text.

        Args:
            texts: n texts.
            batch_size: Texts at once.

        Returns:
            (n, D) fp32 on the CPU.
        """
        vectors = torch.empty(len(texts), self.config.model.hidden_size)
        rows = self._tokenize(texts)
        for places in _alike(rows, batch_size):
            lengths = torch.tensor([len(rows[place]) for place in places])
            segments = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # (B, L)
            token_ids = torch.full(segments.shape, self.vocabulary.pad)
            token_ids[segments.bool()] = torch.tensor([token for place in places for token in rows[place]])
            hidden = self.model.encode(token_ids.to(self.device), segments.to(self.device))  # (B, L, D), zero at pads
            vectors[places] = hidden.float().sum(1).cpu() / lengths[:, None]
        return vectors

    def _tokenize(self, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Return the ids of each text between [CLS] and [SEP], cut at ``training.max_length``."""
        self._tokenizer.encode_special_tokens = not special_tokens
        limit = self.config.training.max_length - 2
        bodies = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        if cut := sum(len(body) > limit for body in bodies):
            log.warning(
                "%d of %d text(s) are longer than %d tokens (training.max_length) and lose their ends",
                cut,
                len(texts),
                limit + 2,
            )
        return [[self.vocabulary.cls, *body[:limit], self.vocabulary.sep] for body in bodies]

    def _text_of(self, token_id: int) -> str:
        if token_id in self.vocabulary.special_ids:
            return str(self._tokenizer.id_to_token(token_id))
        return str(self._tokenizer.decode([token_id]))


def _alike(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of ``batch_size`` rows at a time, rows of similar length together."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
