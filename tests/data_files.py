"""Small Parquet files and settings for the tests of the data."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultrazoo.config import TrainingConfig
from ultrazoo.data import Batch, DataModule, build_data
from ultrazoo.data.finding import CORPUS

TOKENIZER = str(CORPUS / "tokenizer.json")
SENTENCE = "el rey de la casa y las aguas of the king and corazón niño árbol was in her own way señor , . ; never could"
WORDS = SENTENCE.split()


def make_texts(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Return texts of 1 to ``longest`` words; the first word of each is its number, so that rows can be told apart."""
    chance = random.Random(seed)
    return [f"n{i} " + " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for i in range(count)]


def write(path: Path, texts: Sequence[Any], group: int = 50, column: str = "text", **options: Any) -> Path:
    """Write a Parquet file with row groups of ``group`` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = texts if isinstance(texts, pa.Table) else pa.table({column: texts, "other": list(range(len(texts)))})
    pq.write_table(table, path, row_group_size=group, write_page_checksum=True, **options)
    return path


def flip(path: Path, group: int, column: int = 0) -> None:
    """Change one byte in the middle of a column of a row group."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    content[start + chunk.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)


def settings(folder: Path, **changes: Any) -> TrainingConfig:
    """Return a training section for data in ``folder / "data"``, with small windows, rows and batches."""
    values = {
        "local_parquet_dir": str(folder / "data"),
        "cache_dir": str(folder / "cache"),
        "tokenizer": TOKENIZER,
        "batch_size": 7,
        "max_length": 48,
        "dataset_batch_size": 64,
        "validation_fraction": 0.05,
    }
    return TrainingConfig(**{**values, **changes})


def build(folder: Path, lines: list[str] | None = None, **changes: Any) -> DataModule:
    """Build the data; ``lines`` collects what is said."""
    return build_data(settings(folder, **changes), 8192, ([] if lines is None else lines).append)


def originals(batch: Batch) -> list[list[int]]:
    """Return the tokens of each document piece of a batch before masking, with [CLS] and [SEP]."""
    ids = batch.input_ids.where(batch.labels == -100, batch.labels)
    pieces = []
    for row, segments in zip(ids.tolist(), batch.segments.tolist(), strict=True):
        for number in range(1, max(segments) + 1):
            pieces.append([token for token, segment in zip(row, segments, strict=True) if segment == number])
    return pieces


def as_json(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as it is after a trip through a file."""
    return json.loads(json.dumps(state))
