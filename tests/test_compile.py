"""``training.compile``: the same run resumed, nearly that of plain layers, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ultrazoo.config import Config, load_config
from ultrazoo.errors import ConfigError
from ultrazoo.train import train
from ultrazoo.train.profile import parse_steps

SETS = {
    "model.vocab_size": 8192,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 64,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "training.batch_size": 4,
    "training.max_samples": 200,
    "training.eval_max_batches": 1,
    "training.checkpoint_every_n_steps": 2,
    "training.lr_schedule": "constant",
    "training.warmup_ratio": 0,
    "training.num_threads": 1,
}
QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.fspath(tmp_path / "inductor"))
    before = torch.compiler.config.cache_key_tag
    torch.compiler.reset()
    yield
    torch.compiler.config.cache_key_tag = before
    torch.compiler.reset()


def small(folder: Path, compiled: bool, steps: int) -> Config:
    sets = {**SETS, "training.compile": compiled, "training.max_steps": steps, "training.cache_dir": str(folder / "c")}
    return load_config("embbert", [f"{name}={json.dumps(value)}" for name, value in sets.items()]).config


def weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_layers_resume_to_the_bit(tmp_path: Path) -> None:
    whole = train(small(tmp_path, True, 4), run_dir=tmp_path / "whole", console=QUIET)
    assert "ultrazoo" in torch.compiler.config.cache_key_tag
    torch.compiler.reset()  # as in another process
    middle = tmp_path / "whole" / "checkpoints" / "step-000002"
    train(small(tmp_path, True, 4), run_dir=tmp_path / "halves", resume=str(middle), console=QUIET)
    assert weights(tmp_path / "whole") == weights(tmp_path / "halves")
    plain = train(small(tmp_path, False, 4), run_dir=tmp_path / "plain", console=QUIET)
    assert whole["validation_loss"] == pytest.approx(plain["validation_loss"], abs=2e-4)


def test_profile_of_compiled_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--profile: got training\.compile true"):
        train(small(tmp_path, True, 2), run_dir=tmp_path / "run", profile=parse_steps("1..2"), console=QUIET)


def test_checkpointed_layers_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"training\.compile: got true with gradient_checkpointing"):
        load_config("embbert", ["training.compile=true", "training.gradient_checkpointing=true"])
