"""A tiny run and a way to call the command line, shared by the tests of what is done with a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrazoo.cli import main

CONFIG = """
model:
  vocab_size: 300
  hidden_size: 32
  num_layers: 2
  num_heads: 2
  ffn_hidden_size: 64
  layer_pattern: [standard_attn]
  dropout: 0.0
training:
  max_length: 32
  batch_size: 4
  max_steps: 6
  learning_rate: 1e-2
  eval_every_n_steps: 3
  log_every_n_steps: 1
  validation_fraction: 0.1
  device: cpu
  num_threads: 1
"""
TEXT = "the king of the sea and the queen of the land saw el rey del mar y la reina de la tierra"


def write_config(folder: Path) -> Path:
    """Write a small Parquet file and a config that trains on it; return the config's path."""
    words = TEXT.split()
    texts = [" ".join(words[(row * step) % len(words)] for step in range(1, 15)) for row in range(1, 101)]
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
    paths = f"  local_parquet_dir: {folder / 'texts.parquet'}\n  cache_dir: {folder / 'cache'}\n"
    path = folder / "tiny.yaml"
    path.write_text(f"# a tiny model\n{CONFIG}{paths}")
    return path


def call(*arguments: str | Path) -> int:
    """Run ``ultrazoo ARGUMENTS`` in this process and return its exit code; output is pytest's to capture."""
    logger = logging.getLogger("ultrazoo")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(logger, "handlers", [])
        patch.setattr(logger, "level", logger.level)
        patch.setattr(sys, "argv", ["ultrazoo", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")  # else as wide as the terminal of whoever runs the tests
        main()
    code = stopped.value.code
    return code if isinstance(code, int) else 0


def train_tiny(folder: Path) -> Path:
    """Train the tiny model and return its run folder."""
    run = folder / "run"
    assert call("train", write_config(folder), "--output-dir", run) == 0
    return run
