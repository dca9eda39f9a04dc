"""Data of a run: where it comes from, its batches from any position on, and its held-out part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ultrazoo.data.batch import Batch, Share, make_batch
from ultrazoo.data.digests import HASHING
from ultrazoo.data.masking import Masker, word_table
from ultrazoo.data.packing import Documents, Frame, count_rows, pack
from ultrazoo.data.plan import Plan
from ultrazoo.data.randomness import draws, key
from ultrazoo.data.reading import reasons
from ultrazoo.data.sources import ParquetSource
from ultrazoo.data.stores import Store, TokenStore
from ultrazoo.data.tokenizer import Vocabulary
from ultrazoo.data.validation import VALIDATION, held_out_documents
from ultrazoo.data.windows import Window, WindowDataset, iterate
from ultrazoo.errors import DataError
from ultrazoo.revisions import Revisions, current_revisions

if TYPE_CHECKING:
    from ultrazoo.config import TrainingConfig

MASKS = 5
COUNTED_WINDOWS = 64
FORMAT = 1
POSITION = {"plan", "tokenizer_sha256", "fingerprint", "epoch", "window", "row", "window_rows", "seen", "skipped"}
"""Keys of a saved position."""


class DataModule:
    """Training batches without end from a position that can be saved, and validation batches that never change.

    The position is (epoch, window, row) of the next row. Which rows come next, and their masks, are a function of it
    and of ``plan``: not of the number of workers or threads, nor of whether tokens come from a cache.

    Args:
        source: Row groups of the data.
        vocabulary: The tokenizer.
        store: Where documents come from.
        training: The config's training section.
        console: Takes lines about skipped rows.
        revisions: Rules of the run; None: those of a new one.

    Raises:
        DataError: There is no row to train on, or none to validate on.
        ConfigError: Whole words are asked for and the tokenizer does not mark them.
    """

    def __init__(
        self,
        source: ParquetSource,
        vocabulary: Vocabulary,
        store: Store,
        training: TrainingConfig,
        console: Callable[[str], None],
        revisions: Revisions | None = None,
    ) -> None:
        self.source, self.vocabulary, self.store, self.training = source, vocabulary, store, training
        self.revisions = current_revisions() if revisions is None else revisions
        words = word_table(vocabulary, self.revisions["whole_words"]) if training.whole_word_masking else None
        self._masker = Masker(vocabulary, training.mlm_probability, words)
        fixed = self.revisions["validation_masks"] > 1
        eval_probability = training.eval_mlm_probability if fixed else training.mlm_probability
        self._eval_masker = Masker(vocabulary, eval_probability, words)
        self._frame = Frame(training.max_length, vocabulary.pad, vocabulary.cls, vocabulary.sep)
        plan = Plan(
            source.unit_rows,
            training.dataset_batch_size,
            training.seed,
            training.shuffle,
            training.stream_local_parquet,
        )
        self._dataset = WindowDataset(plan, store, self._frame, training.pack_sequences)
        self._console = console
        self.share = Share()
        """Set before the first batch where many processes train: each gets its rows of every batch."""
        self._position = (0, 0, 0)
        self._window_rows = 1
        self._seen: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._damage: dict[str, str] = {}
        self._sample = self._find_sample()
        self._require_held_out()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without truncation or padding."""
        return self.vocabulary.tokenizer()

    @property
    def tokenizer_json(self) -> str:
        """The text of the tokenizer's file, to be kept beside weights."""
        return self.vocabulary.text

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of ``tokenizer_json`` in UTF-8."""
        return self.vocabulary.sha256

    @property
    def fingerprint(self) -> str:
        """Hash of the data: names, sizes and contents of its files, text column, row limit."""
        return self.source.fingerprint

    def fingerprint_as_in(self, state: Mapping[str, Any]) -> str:
        """Return the fingerprint by the rule that a saved state's was made by, to be compared with it."""
        return self.source.fingerprint_by(state.get("hashing", 1))

    @property
    def plan(self) -> dict[str, Any]:
        """The settings that the order of rows depends on, beside data and tokenizer."""
        names = ["seed", "shuffle", "stream_local_parquet", "dataset_batch_size", "max_length", "pack_sequences"]
        return {name: getattr(self.training, name) for name in [*names, "validation_fraction"]}

    def train_batches(self) -> Iterator[Batch]:
        """Yield batches of ``batch_size`` rows from the current position on, through epoch after epoch.

        A batch may reach over the end of an epoch. One iterator at a time: each moves the position.

        Raises:
            DataError: The data cannot be read.
        """
        size, training = self.training.batch_size, self.training
        epoch, index, start = self._position
        windows = iterate(self._dataset, epoch, index, workers=training.dataloader_workers, seed=training.seed)
        parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[np.uint64]]] = []
        missing = size
        with closing(windows):
            for window in windows:
                if start == 0:
                    self._count(window)
                rows = len(window.tokens)
                states = draws(key(MASKS, training.seed, window.epoch, window.index), np.arange(rows))
                row, start = start, 0
                while row < rows:
                    end = min(row + missing, rows)
                    parts.append((window.tokens[row:end], window.segments[row:end], states[row:end]))
                    missing -= end - row
                    row = end
                    if missing == 0:
                        self._position, self._window_rows = (window.epoch, window.index, row), rows
                        tokens, segments, streams = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                        yield make_batch(tokens, segments, streams, self._masker, self.share)
                        parts, missing = [], size

    def _count(self, window: Window) -> None:
        if (window.epoch, window.index) == (1, 0) and self._skipped:
            self._console(f"data: skipped in the first epoch: {reasons(self._skipped)}")
        for place, damage in window.damage.items():
            if place not in self._damage:
                self._damage[place] = damage
                self._tell(damage)
        if window.epoch == 0:
            self._skipped.update(window.skipped)
            self._seen.update(tokens=window.num_tokens, bytes=window.bytes)

    def _tell(self, damage: str) -> None:
        self._console(f"warning: data: {damage}; its rows from there on are skipped (training.on_bad_data)")

    def _find_sample(self) -> tuple[int, Documents]:
        """Return the first window of the first epoch with a row to train on, and its documents.

        Raises:
            DataError: There is none.
        """
        skipped: Counter[str] = Counter()
        for window in range(len(self._dataset.epoch_plan(0))):
            reading = self._dataset.read((0, window))
            if reading.documents.lengths.any():
                return window, reading.documents.compact()
            skipped.update(reading.skipped)
        if isinstance(self.store, TokenStore):
            skipped.update(self.store.manifest["skipped"])
        raise DataError(
            f"{self.training.local_parquet_dir or 'embedded corpus'}: no usable row to train on among "
            f"{self.source.num_rows} (skipped: {reasons(skipped) or 'none'}; held out: "
            f"{self.training.validation_fraction:.0%}, at least 1); expected text in column "
            f"{self.source.text_column!r}; add rows or set training.text_column"
        )

    def _require_held_out(self) -> None:
        """Find out before the first step whether the first validation has a row.

        Raises:
            DataError: It has none.
        """
        if not self._read_held_out(wanted=1).lengths.any():
            raise DataError(
                f"training.validation_fraction: no usable row among the {self.training.validation_fraction:.0%} held "
                "out; expected at least one; raise the fraction or add rows"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch yielded, and what it is a position in, as JSON values."""
        epoch, window, row = self._position
        return {
            "format": FORMAT,
            "epoch": epoch,
            "window": window,
            "row": row,
            "window_rows": self._window_rows,
            "fingerprint": self.fingerprint,
            "hashing": HASHING,
            "discovery": self.source.found.discovery,
            "tokenizer_sha256": self.tokenizer_sha256,
            "plan": self.plan,
            "seen": dict(self._seen),
            "skipped": dict(self._skipped),
            "damage": dict(self._damage),
            "damaged_files": {file.name: file.reason for file in self.source.damaged},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next iterator starts there.

        Raises:
            DataError: Data, tokenizer or settings differ from those that the position was saved with.
        """
        if state.get("format") != FORMAT:
            raise DataError(
                f"data state: got format {state.get('format')!r}, expected {FORMAT}; it is of another version"
            )
        if missing := sorted(POSITION - state.keys()):
            raise DataError(f"data state: lacks {', '.join(missing)}; use another checkpoint")
        given, own = dict(state["plan"]), self.plan
        problems = [
            f"training.{name}: saved {given.get(name)!r}, now {value!r}"
            for name, value in own.items()
            if given.get(name) != value
        ]
        if state["tokenizer_sha256"] != self.tokenizer_sha256:
            problems.append(
                f"tokenizer: saved {state['tokenizer_sha256'][:12]}, now {self.tokenizer_sha256[:12]} (SHA-256)"
            )
        fingerprint = self.fingerprint_as_in(state)
        if state["fingerprint"] != fingerprint:
            problems.append(
                f"data: saved {state['fingerprint'][:12]}, now {fingerprint[:12]} (hash of the names, sizes and "
                "contents of the files, text_column and max_samples)"
            )
        if problems:
            raise DataError(
                "data state: cannot go on at the saved position, which would repeat or lose rows: "
                + "; ".join(problems)
                + "; put these back, or start a new run"
            )
        if fingerprint != self.fingerprint:
            names = ", ".join(file.name for file in self.source.large_files)
            self._console(
                "warning: data: the checkpoint is of an earlier version, which compared files over 64 MiB by samples; "
                f"the samples of {names} are equal, the rest cannot be compared; new checkpoints compare whole files"
            )
        self._position = (int(state["epoch"]), int(state["window"]), int(state["row"]))
        self._window_rows = int(state["window_rows"])
        self._seen, self._skipped = Counter(state["seen"]), Counter(state["skipped"])
        self._damage = dict(state.get("damage", {}))
        for damage in self._damage.values():
            self._tell(damage)

    @property
    def epoch(self) -> float:
        """Passes over the data so far; within a window, in proportion to its rows."""
        epoch, window, row = self._position
        return epoch + (window + row / self._window_rows) / len(self._dataset.epoch_plan(epoch))

    @cached_property
    def rows_per_epoch(self) -> int:
        """Packed rows in an epoch.

        Exact for the first epoch of up to 64 windows (others differ by the packing, under a percent); beyond, and when
        streaming (by one window), scaled up from a sample.
        """
        plan = self._dataset.epoch_plan(0)
        number, documents = self._sample
        lengths = {number: documents.lengths}
        if not self.training.stream_local_parquet:
            for window in np.linspace(0, len(plan) - 1, min(COUNTED_WINDOWS, len(plan))).astype(int).tolist():
                lengths[window] = self._dataset.read((0, window)).documents.lengths
        read = sum(span.stop - span.start for window in lengths for span in plan.spans(window))
        length, packed = self.training.max_length, self.training.pack_sequences
        rows = sum(count_rows(window_lengths, length, packed) for window_lengths in lengths.values())
        return max(1, round(rows * self.source.num_rows / read))

    @cached_property
    def _held_out(self) -> Documents:
        training = self.training
        return self._read_held_out(training.eval_max_batches * training.batch_size * training.max_length)

    def _read_held_out(self, wanted: int) -> Documents:
        """Read held-out documents until they have so many tokens."""
        training = self.training
        return held_out_documents(
            self.source,
            self.store,
            rows_at_once=training.dataset_batch_size,
            max_length=training.max_length,
            wanted=wanted,
        )

    @cached_property
    def _validation(self) -> list[Batch]:
        training, size = self.training, self.training.batch_size
        tokens, segments = pack(self._held_out, self._frame, packed=training.pack_sequences, key=(VALIDATION,))
        states = draws(key(MASKS, VALIDATION), np.arange(len(tokens)))
        batches = [slice(start, start + size) for start in range(0, len(tokens), size)][: training.eval_max_batches]
        parts = [(tokens[rows], segments[rows], states[rows]) for rows in batches]
        return [make_batch(*part, self._eval_masker, self.share) for part in parts]

    def validation_batches(self) -> list[Batch]:
        """Return at most ``eval_max_batches`` batches of held-out rows; the same, masks included, for every seed.

        Raises:
            DataError: The data cannot be read.
        """
        return self._validation

    @cached_property
    def unigram_counts(self) -> NDArray[np.int64]:
        """(tokenizer's size,) how often each token occurs, special tokens left out.

        Over all rows that are trained on if there is a cache; otherwise over one window of them. Rule
        ``unigram_counts``, revision 1: with the held-out rows.
        """
        with_held_out = self.revisions["unigram_counts"] == 1
        if isinstance(self.store, TokenStore):
            counts = self.store.counts - (0 if with_held_out else self.store.held_out_counts())
        else:
            parts = [self._held_out.ids] if with_held_out else []
            counts = np.bincount(np.concatenate([*parts, self._sample[1].ids]), minlength=self.vocabulary.size)
        return np.where(self.vocabulary.is_special, 0, counts).astype(np.int64)

    @cached_property
    def unigram_entropy(self) -> float:
        """-sum p log p in nats per token of ``unigram_counts``: the loss of the best guess that sees no context."""
        counts = self.unigram_counts[self.unigram_counts > 0]
        shares = counts / max(counts.sum(), 1)
        return float(-(shares * np.log(shares)).sum())

    @property
    def stats(self) -> dict[str, Any]:
        """``files``, ``rows``, ``skipped`` by reason, ``tokens`` without special ones, ``bytes`` of usable text.

        ``damage`` says by row group why rows of it are hidden, ``damaged_files`` by name why a file is left out.
        Without a cache all but these files cover what the first epoch has read so far.
        """
        facts: dict[str, Any] = {"files": len(self.source.files), "rows": self.source.num_rows}
        facts["damaged_files"] = {file.name: file.reason for file in self.source.damaged}
        if isinstance(self.store, TokenStore):
            manifest = {"damage": {}} | self.store.manifest
            return facts | {name: manifest[name] for name in ("skipped", "damage", "tokens", "bytes")}
        facts |= {"skipped": dict(sorted(self._skipped.items())), "damage": dict(sorted(self._damage.items()))}
        return facts | {"tokens": self._seen["tokens"], "bytes": self._seen["bytes"]}

    @property
    def left_out(self) -> str:
        """What of the data was not used, in one line; empty if all of it was."""
        stats = self.stats
        counts = {"row": sum(stats["skipped"].values()), "file": len(stats["damaged_files"])}
        parts = [f"{count:,} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
        why = reasons(stats["skipped"])
        return " and ".join(parts) + (f" ({why})" if why else "")
