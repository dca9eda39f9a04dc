"""Config files for tests."""

from __future__ import annotations

from pathlib import Path

SMALL = "model: {hidden_size: 32, num_heads: 4, num_layers: 2, ffn_hidden_size: 64, vocab_size: 100}\n"


def write(folder: Path, text: str) -> Path:
    """Write a config file and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path
