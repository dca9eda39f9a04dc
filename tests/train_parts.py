"""Small parts to train with: random rows that can be resumed, a tiny model, a config, a trainer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ultrazoo.config import Config, config_from_dict
from ultrazoo.model import MaskedLMOutput
from ultrazoo.train.display import PlainDisplay
from ultrazoo.train.loop import Trainer
from ultrazoo.train.schedule import make_plan
from ultrazoo.train.store import CheckpointStore

VOCAB, LENGTH, WIDTH = 32, 12, 8


@dataclass
class Rows:
    """A batch, with the fields that the data module gives it."""

    input_ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device) -> Rows:
        return self


def rows(first: int, count: int) -> Rows:
    """Rows ``first`` to ``first + count``, each drawn from its own number: rows of different lengths and masks."""
    ids, segments, labels = [], [], []
    for index in range(first, first + count):
        draw = torch.Generator().manual_seed(index)
        real = int(torch.randint(LENGTH // 2, LENGTH + 1, (), generator=draw))
        row = torch.randint(5, VOCAB, (LENGTH,), generator=draw)
        row = torch.where(torch.arange(LENGTH) % 2 == 0, row, (row.roll(1) * 3) % (VOCAB - 5) + 5)
        masked = (torch.rand(LENGTH, generator=draw) < 0.3) & (torch.arange(LENGTH) < real)
        masked[index % 3] = True
        labels.append(torch.where(masked, row, -100))
        ids.append(torch.where(torch.arange(LENGTH) < real, torch.where(masked, 4, row), 0))
        segments.append((torch.arange(LENGTH) < real).long())
    stacked = torch.stack(segments)
    return Rows(torch.stack(ids), stacked, torch.stack(labels), int(stacked.sum()))


class RowData:
    """Endless numbered rows behind the interface of the data module."""

    tokenizer_sha256 = "tokenizer"
    rows_per_epoch: int | None = 64
    unigram_entropy = 3.3

    def __init__(self, batch_size: int, fingerprint: str = "rows") -> None:
        self.batch_size, self.fingerprint = batch_size, fingerprint
        self.vocabulary = SimpleNamespace(text="{}\n")
        self.next_row = 0

    @property
    def epoch(self) -> float:
        return self.next_row / 64

    @property
    def stats(self) -> dict[str, Any]:
        return {"files": 1, "rows": 64, "skipped": {}, "damage": {}, "damaged_files": {}}

    def train_batches(self) -> Iterator[Rows]:
        while True:
            batch = rows(self.next_row, self.batch_size)
            self.next_row += self.batch_size
            yield batch

    def validation_batches(self) -> list[Rows]:
        return [rows(10**6 + 8 * index, 8) for index in range(3)]

    def state_dict(self) -> dict[str, Any]:
        return {"next_row": self.next_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_row = state["next_row"]


class TinyModel(nn.Module):
    """Embeddings, a linear layer with dropout, a tied head; the initial weights are always the same."""

    def __init__(self, dropout: float = 0.1, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB)
        self.head.weight = self.embeddings.weight
        nn.init.normal_(self.embeddings.weight, std=0.3)
        self.poisoned_calls: set[int] = set()
        self.poisonous_rows: set[int] = set()
        """Numbers of rows (see ``rows``) whose batch has a loss of NaN in training, whenever it comes."""
        self.calls = 0
        self.poisoned: list[int] = []
        """Poisonous rows in the order in which they came."""

    def forward(
        self, input_ids: torch.Tensor, segments: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> MaskedLMOutput:
        x = self.embeddings(input_ids)
        x = x + self.layers[0](x.roll(1, 1) + x.roll(-1, 1))
        assert labels is not None
        assert segments is not None
        logits = self.head(self.norm(x[labels != -100]))
        loss = nn.functional.cross_entropy(logits.float(), labels[labels != -100], reduction="sum")
        self.calls += self.training
        if self.training and self.calls in self.poisoned_calls:
            loss = loss * float("nan")
        for row in self.poisonous_rows if self.training else ():
            if (input_ids == rows(row, 1).input_ids).all(1).any():
                self.poisoned.append(row)
                loss = loss * float("nan")
        aux = {"balance_loss": 0.01 * x[segments > 0].square().mean()}
        stats = {"load": torch.tensor([0.25, 0.75]), "moe_load": torch.tensor([[0.125, 0.375, 0.25, 0.25], [0.25] * 4])}
        return MaskedLMOutput(x, logits, loss, logits.shape[0], aux, stats)


def make_config(**training: Any) -> Config:
    """A config whose training section is small; the model section only has to be valid."""
    small = {"batch_size": 4, "max_steps": 12, "learning_rate": 1e-2, "device": "cpu", "log_every_n_steps": 2}
    small |= {"eval_every_n_steps": 4, "checkpoint_every_n_steps": 4, "nan_check_interval": 1, "num_threads": 1}
    model = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": 1, "num_heads": 1, "ffn_hidden_size": WIDTH}
    return config_from_dict({"model": model, "training": small | training}, "test")


class Recorder:
    """Keeps the records of a run."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Any) -> None:
        self.records.append(dict(record))

    def sync(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def column(self, name: str) -> dict[int, Any]:
        return {record["step"]: record[name] for record in self.records if name in record}


def make_trainer(
    folder: Path, config: Config | None = None, *, model: nn.Module | None = None, data: RowData | None = None
) -> tuple[Trainer, Recorder]:
    """A trainer of the tiny model, whose weights are always the same."""
    config = config or make_config()
    training = config.training
    store = CheckpointStore(folder, training.max_rolling_checkpoints, training.num_best_checkpoints)
    data = data or RowData(training.batch_size)
    plan = make_plan(training, data.rows_per_epoch)
    display = PlainDisplay(Console(file=io.StringIO(), width=200), plan.total_steps)
    model = model or TinyModel()
    torch.manual_seed(training.seed)
    trainer = Trainer(config, model, data, plan, store, display)  # type: ignore[arg-type]
    trainer.flights.folder = folder / "flight"
    recorder = Recorder()
    trainer.reporters.append(recorder)
    return trainer, recorder
