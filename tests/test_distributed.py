"""Many processes train as one: the same rows, losses, checkpoints and stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_parts import RowData, make_config, make_trainer, rows

from ultrazoo.config import ModelConfig, config_from_dict
from ultrazoo.data.batch import Share, make_batch
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.model import build_model
from ultrazoo.nn.moe import MoE, MoEConfig
from ultrazoo.train import team as teams
from ultrazoo.train.checkpoint import read_tensors
from ultrazoo.train.objective import accumulate
from ultrazoo.train.team import Team, Totals, joined, seed_of
from ultrazoo.train.verify import verify_run

MODEL = {"vocab_size": 8192, "hidden_size": 16, "num_layers": 2, "num_loops": 2, "num_heads": 2, "retention_heads": 2}
MODEL |= {"ffn_hidden_size": 16, "dropout": 0.0, "layer_pattern": ["retnet", "titan_attn"], "use_moe": True}
TRAINING: dict[str, Any] = {"batch_size": 5, "gradient_accumulation_steps": 2, "max_length": 32, "max_steps": 4}
TRAINING |= {"exact_balance_loss": True}
TRAINING |= {"device": "cpu", "num_threads": 1, "kernels": "reference", "max_samples": 300, "dataset_batch_size": 64}
TRAINING |= {"log_every_n_steps": 1, "eval_every_n_steps": 2, "eval_max_batches": 2, "checkpoint_every_n_steps": 2}
TRAINING |= {"learning_rate": 1e-2, "log_gradient_stats": True, "gradient_log_interval": 2, "on_nan": "stop"}
SUMS = 5e-6
"""Differences from sums in another order; the losses are about 6."""
NORMS = 5e-5
"""The same, relative, of norms over 130,000 numbers, which torch adds up one after the other in float32."""


def in_processes(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ultrazoo, under torchrun if it is for several processes."""
    command = [sys.executable, "-m", "ultrazoo", *arguments]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def run_training(folder: Path, processes: int, *arguments: str) -> dict[tuple[int, str], float]:
    """Train in processes of their own; return the records by step and name."""
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps({"model": MODEL, "training": TRAINING}))
    done = in_processes(processes, "train", str(config), "--output-dir", str(folder), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 4/4") == 1, "one process speaks"
    found: dict[tuple[int, str], float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("loss", "validation_loss", "grad_norm", "moe_balance_loss", "tokens"):
            if name in record:
                found[record["step"], name] = record[name]
        for block, entries in record.get("gradients", {}).items():
            found[record["step"], f"{block} norm"] = entries["norm"]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, str], float]]:
    folder = tmp_path_factory.mktemp("distributed") / "alone"
    return folder, run_training(folder, 1)


def assert_same(found: dict[tuple[int, str], float], expected: dict[tuple[int, str], float]) -> None:
    assert found.keys() == expected.keys()
    assert len({step for step, _ in expected}) == 4
    for place, value in expected.items():
        assert found[place] == pytest.approx(value, rel=NORMS if "norm" in place[1] else 0, abs=SUMS), place


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        left, right = (read_tensors(folder / "checkpoints" / "step-000004" / name) for folder in (one, other))
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            assert (tensor.shape, tensor.dtype) == (right[key].shape, right[key].dtype), key
            assert torch.allclose(tensor, right[key], rtol=1e-3, atol=1e-4), key


def test_two_replicas_train_as_one_process_and_their_checkpoint_goes_on_in_one(
    tmp_path: Path, alone: tuple[Path, dict[tuple[int, str], float]]
) -> None:
    folder, expected = alone
    assert_same(run_training(tmp_path / "two", 2), expected)
    assert_same_weights(folder, tmp_path / "two")
    branch = tmp_path / "branch"
    early = str(tmp_path / "two" / "checkpoints" / "step-000002")
    assert_same(run_training(branch, 1, "--resume", early), expected)
    assert_same_weights(folder, branch)
    with pytest.raises(
        CheckpointError,
        match=r"taken by 2 processes.*run torchrun --nproc-per-node 2 -m ultrazoo resume \S+two --verify",
    ):
        verify_run(tmp_path / "two")
    done = in_processes(2, "resume", str(tmp_path / "two"), "--verify")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("equal to the last bit over 2 steps") == 1, "one process speaks"


def test_two_shards_go_on_from_one_process_as_it_went_on_itself(
    tmp_path: Path, alone: tuple[Path, dict[tuple[int, str], float]]
) -> None:
    folder, expected = alone
    early = str(folder / "checkpoints" / "step-000002")
    options = ("--set", "training.distributed=fsdp", "--set", "training.gradient_checkpointing=true")
    assert_same(run_training(tmp_path / "two", 2, "--resume", early, *options), expected)
    assert_same_weights(folder, tmp_path / "two")


def test_shares_hold_every_row_once() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 5, 32):
            parts = [list(range(count))[Share(rank, size).of(count)] for rank in range(size)]
            assert [row for part in parts for row in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_is_masked_as_it_is_in_the_whole_batch_and_an_empty_one_has_no_target() -> None:
    def masker(tokens: Any, segments: Any, states: Any) -> tuple[Any, Any]:
        return tokens + states[:, None].astype(np.int64), tokens

    tokens, states = np.arange(12).reshape(3, 4), np.array([7, 8, 9], np.uint64)
    segments = np.ones_like(tokens)
    whole = make_batch(tokens, segments, states, masker)  # type: ignore[arg-type]
    parts = [make_batch(tokens, segments, states, masker, Share(rank, 2)) for rank in range(2)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    idle = make_batch(tokens[:1], segments[:1], states[:1], masker, Share(0, 2))  # type: ignore[arg-type]
    assert (idle.labels == -100).all()
    assert idle.num_tokens == 0


def test_gradients_of_shares_average_to_that_of_the_whole_batch(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, make_config(batch_size=5), data=RowData(5))
    model, precision = trainer.model.eval(), trainer.precision
    accumulate(model, [rows(0, 5)], precision)  # type: ignore[list-item]
    expected = {name: p.grad.clone() for name, p in trainer.parameters if p.grad is not None}
    totals = Team().totals([rows(0, 5)])  # type: ignore[list-item]

    class Two(Team):
        size = 2

    found: dict[str, torch.Tensor] = {}
    for first, count in ((0, 2), (2, 3)):
        model.zero_grad(set_to_none=True)
        accumulate(model, [rows(first, count)], precision, Two(), totals)  # type: ignore[list-item]
        for name, parameter in trainer.parameters:
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros(())) + parameter.grad / 2
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name
    assert totals == Totals(sum(int((rows(i, 1).labels != -100).sum()) for i in range(5)), rows(0, 5).num_tokens)


def test_the_balance_loss_counts_the_visits_of_all_processes() -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(hidden_size=8, ffn_hidden_size=8, num_experts=4, top_k_experts=2))
    x = torch.randn(4, 6, 8)
    whole = layer(x)[1]
    counts: list[torch.Tensor] = []
    layer.sum_counts = lambda own: counts.append(own) or own
    for part in (x[:1], x[1:]):
        layer(part)
    layer.sum_counts = lambda own: counts[0] + counts[1]
    parts = [layer(part)[1] for part in (x[:1], x[1:])]
    assert torch.equal(parts[0]["moe_load"], whole["moe_load"])
    summed = parts[0]["moe_balance_loss"] / 4 + parts[1]["moe_balance_loss"] * 3 / 4
    assert torch.allclose(summed, whole["moe_balance_loss"])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_bit(dropout: float) -> None:
    config = ModelConfig.model_validate({**MODEL, "vocab_size": 64, "dropout": dropout})
    ids = torch.randint(5, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(config)
        model.recompute_layers(recompute)
        output = model(ids, labels=ids)
        (output.loss_sum + sum(output.losses.values())).backward()
        results.append([output.loss_sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_dropout_differs_between_processes_and_that_of_the_first_is_the_runs_own() -> None:
    assert seed_of(5, 0) == 5
    assert len({seed_of(seed, rank, step) for seed in (0, 1) for rank in range(8) for step in (0, 500)}) == 32


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use_galore: got true with distributed fsdp"):
        config_from_dict({"training": {"distributed": "fsdp", "use_galore": True}}, "test")
    for name, value in zip(teams.TORCHRUN, ("1", "8", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"batch_size: got 4 with 8 processes"), joined(make_config().training):
        pass
    with (
        pytest.raises(ConfigError, match="'cuda:0' with 8 processes"),
        joined(make_config(batch_size=8, device="cuda:0").training),
    ):
        pass
