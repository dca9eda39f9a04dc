"""The table of ``--profile``: every moment and product in one part, and a run that is not changed by it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ultrazoo.config import Config, load_config
from ultrazoo.errors import ConfigError
from ultrazoo.train import train
from ultrazoo.train.profile import BACKWARD, PREFIX, Found, Interval, collect, parse_steps

SETS = {
    "model.vocab_size": 8192,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "training.max_steps": 3,
    "training.batch_size": 4,
    "training.max_samples": 200,
    "training.gradient_accumulation_steps": 2,
    "training.eval_max_batches": 1,
    "training.num_threads": 1,
}


def small(folder: Path, **more: Any) -> Config:
    sets = {**SETS, "training.cache_dir": folder / "cache", **more}
    return load_config("embbert", [f"{name}={json.dumps(value, default=str)}" for name, value in sets.items()]).config


def weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "step-000003" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_profile_names_the_parts_and_changes_nothing(tmp_path: Path, checkpointing: bool) -> None:
    config = small(tmp_path, **{"training.gradient_checkpointing": checkpointing})
    text = io.StringIO()
    console = Console(file=text, width=150)
    train(config, run_dir=tmp_path / "seen", profile=range(2, 4), console=console)
    train(config, run_dir=tmp_path / "unseen", console=Console(quiet=True))
    assert weights(tmp_path / "seen") == weights(tmp_path / "unseen")
    shown = text.getvalue()
    rows = dict(re.findall(r"│ (\S[^│]*?) +│ +[\d,.]+ │ +([\d.]+)%", shown))
    own = {"mixer standard_attn", "ffn mlp", "norms", "embeddings", "head and loss", "optimiser", "data", "other"}
    assert own | {"dropout and residuals", "whole step"} == set(rows)
    assert sum(float(share) for name, share in rows.items() if name != "whole step") == pytest.approx(100, abs=0.6)
    assert float(rows["mixer standard_attn"]) > 5 and float(rows["other"]) < 40
    assert json.loads((tmp_path / "seen" / "profile.json").read_bytes())["traceEvents"]


def test_steps_that_the_run_does_not_reach_are_told(tmp_path: Path) -> None:
    out = io.StringIO()
    train(small(tmp_path), run_dir=tmp_path / "run", profile=range(20, 23), console=Console(file=out, width=200))
    assert "nothing was profiled: the run took 3 steps, expected 20 to 22" in out.getvalue()


def test_products_are_counted_forwards_and_backwards(tmp_path: Path) -> None:
    text = io.StringIO()
    options = {"training.gradient_accumulation_steps": 1, "training.max_length": 64}
    train(
        small(tmp_path, **options), run_dir=tmp_path / "run", profile=range(3, 4), console=Console(file=text, width=150)
    )
    (row,) = [line for line in text.getvalue().splitlines() if "ffn mlp" in line]
    expected = 2 * 3 * 2 * 2 * (4 * 64) * 32 * 64 / 1e9  # layers, passes, matrices, flops, tokens
    assert float(row.split("│")[4]) == pytest.approx(expected, abs=0.006)


def event(name: str, start: float, end: float, flops: float = 0, number: int = -1) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), flops=flops, sequence_nr=number)


def test_time_goes_to_the_innermost_part_and_backwards_to_the_part_that_made_the_node() -> None:
    events = [
        event(PREFIX + "step", 0, 100),
        event(PREFIX + "head and loss", 10, 60),
        event(PREFIX + "norms", 20, 30),
        event("aten::mm", 40, 50, flops=7),
        event(BACKWARD + "MmBackward0", 60, 80, number=5),
        event("aten::mm", 62, 79, flops=14),
        event(BACKWARD + "LayerNormBackward0", 80, 90, number=3),
        event(BACKWARD + "AccumulateGrad", 90, 95, number=2**63),
        event("aten::mm", 200, 210, flops=99),  # outside of the steps
    ]
    found = Found()
    collect(events, [Interval(3, 4, "norms"), Interval(0, 9, "head and loss")], found)
    microseconds = {name: part.seconds * 1e6 for name, part in found.parts.items()}
    assert microseconds == pytest.approx({"other": 20, "head and loss": 60, "norms": 20})
    assert found.parts["head and loss"].flops == 21


def test_share_of_the_ceiling() -> None:
    found = Found(steps=2, step_seconds=[2.0, 2.0], ceilings=[10.0, 50.0, 20.0])
    found.parts["ffn mlp"].flops = 48.0
    assert found.gemm_share == pytest.approx(48 / 2 / 2 / 20)


@pytest.mark.parametrize("text", ["", "4", "0..3", "6..4", "a..b"])
def test_steps_that_are_no_range(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--profile-steps: got .* expected FIRST\.\.LAST"):
        parse_steps(text)


def test_steps() -> None:
    assert parse_steps("4..6") == range(4, 7)
