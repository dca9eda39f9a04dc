"""Data too small for a batch, a record or a validation: each is said in words, and never as ``nan`` or ``-``."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_files import settings, write
from rich.console import Console

from ultrazoo.config import config_from_dict
from ultrazoo.data import build_data
from ultrazoo.data.sources import Span
from ultrazoo.errors import DataError
from ultrazoo.train import train

MODEL = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 16}
TRAINING: dict[str, Any] = {"max_length": 8, "device": "cpu", "num_threads": 1, "log_every_n_steps": 1}


def run(folder: Path, texts: Sequence[str], **changes: Any) -> tuple[list[str], dict[str, Any]]:
    """Train on texts; return the lines that were shown and the figures of the final table."""
    write(folder / "data/a.parquet", texts)
    paths = {"local_parquet_dir": str(folder / "data"), "cache_dir": str(folder / "cache")}
    config = config_from_dict({"model": MODEL, "training": TRAINING | paths | changes}, "test")
    console = Console(file=io.StringIO(), width=200)
    result = train(config, run_dir=folder / "run", console=console)
    return console.file.getvalue().splitlines(), result  # type: ignore[attr-defined]


def test_a_batch_larger_than_the_data_and_a_validation_without_targets(tmp_path: Path) -> None:
    texts = ["the king of the sea"] * 3 + ["the queen"]
    lines, result = run(tmp_path, texts, batch_size=32, gradient_accumulation_steps=2, max_steps=2)
    [batch] = [line for line in lines if "training.batch_size" in line]
    assert batch.startswith("warning: training.batch_size: a step takes 64 rows (batch_size 32 x gradient_accumulation")
    assert "but one pass over the data has" in batch and "every step repeats rows" in batch
    [none] = [line for line in lines if "no validation loss" in line]
    assert none.startswith("warning: step 2: no validation loss: none of the") and "held-out tokens is a target" in none
    assert any("validation loss" in line and "none (no targets)" in line for line in lines)
    assert result["validation_loss"] is None and result["train_loss"] > 0


def test_a_batch_of_as_many_rows_as_the_data_is_not_mentioned(tmp_path: Path) -> None:
    lines, _ = run(tmp_path, ["the king of the sea and the land"] * 40, batch_size=4, max_steps=1)
    assert not any("training.batch_size" in line for line in lines)


def test_records_without_targets(tmp_path: Path) -> None:
    texts = ["the king of the sea and the land " * 3] * 40
    lines, _ = run(tmp_path, texts, batch_size=1, max_steps=4, mlm_probability=0.001)
    assert sum("loss none (no targets)" in line for line in lines) == 4
    assert sum("none of the tokens since the last record is a target" in line for line in lines) == 1
    assert not any("nan" in line for line in lines)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records if "lr" in record] == [None] * 4


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_without_text_are_found_before_the_first_step(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "data/a.parquet", texts := ["the king of the sea"] * 60)
    whole = build_data(settings(tmp_path), 8192, lambda line: None)
    kept = whole.store.split.held_out(Span(0, 0, 50)).tolist() + whole.store.split.held_out(Span(1, 0, 10)).tolist()  # type: ignore[attr-defined]
    write(tmp_path / "data/a.parquet", ["" if held else text for text, held in zip(texts, kept, strict=True)])
    changes = {"stream_local_parquet": streaming, "prefer_local_cache": not streaming}
    with pytest.raises(DataError, match=r"training\.validation_fraction: no usable row among the 5% held out"):
        build_data(settings(tmp_path, **changes), 8192, lambda line: None)
