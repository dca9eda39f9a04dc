"""Compute and memory of a step, estimated before the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrazoo.bench import footprint
from ultrazoo.bench.footprint import Memory, count_flops, measure_memory
from ultrazoo.config import Config, config_from_dict
from ultrazoo.errors import UltrazooError
from ultrazoo.model import build_model
from ultrazoo.train.amp import Precision
from ultrazoo.train.memory import OutOfMemoryError
from ultrazoo.train.objective import accumulate

MODEL = {"vocab_size": 500, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 64, "dropout": 0.0}


def make_config(model: dict[str, Any] | None = None, **training: Any) -> Config:
    small = {"max_length": 64, "batch_size": 8, "num_threads": 1, "mlm_probability": 0.25}
    return config_from_dict({"model": MODEL | (model or {}), "training": small | training}, "test")


def test_flops_of_products_and_attention_by_hand() -> None:
    config = make_config({"layer_pattern": ["standard_attn"]}, gradient_accumulation_steps=3)
    model = build_model(config.model)
    found, seconds = count_flops(model, config)
    tokens, D, F, L, V = 8 * 64, 32, 64, 64, 500
    attention = {spec.name: spec for spec in footprint.registry().ops().values()}["ultrazoo::attention"]
    q = torch.zeros(8, L, 2, D // 2)
    sample = next(iter(attention.samples(torch.device("cpu"), torch.float32)))
    inside = attention.cost(type(sample)(name="step", args=(q, q, q))).flops
    layers = 2 * (3 * 2 * tokens * (4 * D * D + 2 * D * F) + 3 * inside)
    head = 3 * 2 * 128 * (D * D + D * V)
    assert found == pytest.approx(3 * (layers + head), rel=1e-6)
    assert seconds > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_scale_from_few_rows_to_a_batch(recompute: bool) -> None:
    pattern = ["retnet", "mamba", "titan_attn"]
    moe = {"layer_pattern": pattern, "num_layers": 3, "use_moe": True, "retention_heads": 2}
    config = make_config(moe, batch_size=16)
    model = build_model(config.model)
    model.recompute_layers(recompute)
    counter = FlopCounterMode(display=False, custom_mapping=footprint._formulas())
    with counter:
        accumulate(model, [footprint._batch(config, 16, 256)], Precision(torch.device("cpu"), None))
    assert count_flops(model, config)[0] == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_memory_is_extrapolated_when_a_batch_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pretend(config: Config, rows: int) -> dict[str, int]:
        asked.append(rows)
        return {"weights": 100, "gradients": 100, "optimizer": 200, "peak": 500 + 10 * rows}

    monkeypatch.setattr(footprint, "_in_a_process", pretend)
    memory = measure_memory(make_config(batch_size=64), seconds=1.0)
    assert memory is not None
    assert asked == [4, 8]
    assert memory == Memory(weights=100, gradients=100, optimizer=200, peak=500 + 640, rows=(4, 8))
    assert (memory.activations, memory.basis) == (740, "extrapolated from 4 and 8 rows per micro-batch")
    short = measure_memory(make_config(batch_size=64), seconds=0.1)
    assert short is not None and short.rows == (64,)
    monkeypatch.setattr(footprint, "CLEAR", Path("/no/such"))
    assert measure_memory(make_config(batch_size=64), seconds=0.1) is None


def test_memory_of_a_real_step_has_all_tensors_in_it() -> None:
    config = make_config({"vocab_size": 20_000, "hidden_size": 128, "num_heads": 4}, gradient_accumulation_steps=2)
    memory = measure_memory(config, seconds=0.0)
    assert memory is not None
    size = sum(p.nbytes for p in build_model(config.model).parameters())
    assert (memory.weights, memory.gradients) == (size, size)
    assert 2 * size <= memory.optimizer < 2.01 * size
    logits = 4 * 8 * 64 * 0.25 * 20_000
    assert logits < memory.activations < 20 * logits


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [(-1, UltrazooError, "ended with exit code"), (10**9, OutOfMemoryError, "ran out of memory")],
)
def test_a_measurement_that_fails_says_why(rows: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"with {rows} rows {text}"):
        footprint._in_a_process(make_config(), rows)
