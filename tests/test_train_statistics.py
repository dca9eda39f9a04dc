"""What is recorded of blocks equals its formula, and what looks unwell is said once."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from train_parts import TinyModel, make_config, make_trainer

from ultrazoo.config import ModelConfig
from ultrazoo.model import build_model
from ultrazoo.nn.bitlinear import BitLinear, ternary_shares, ternary_ste
from ultrazoo.train.metrics import Window
from ultrazoo.train.signals import SignalGuard
from ultrazoo.train.statistics import BlockReport, gradient_statistics, module_statistics, weight_statistics
from ultrazoo.train.tensorboard import TensorBoard
from ultrazoo.train.watch import LossWatch, RouterWatch, Watch


def test_the_update_ratio_is_what_the_optimiser_really_did(tmp_path: Path) -> None:
    config = make_config(log_gradient_stats=True, gradient_log_interval=3, nan_check_interval=50)
    trainer, recorder = make_trainer(tmp_path, config, model=TinyModel(0))
    trainer._batches = trainer.data.train_batches()
    for _ in range(2):
        trainer.step()
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters}
    trainer.step()
    [record] = recorder.records
    names = ("layers.0.0.weight", "layers.0.0.bias")
    after = dict(trainer.parameters)
    change = math.hypot(*((after[name] - before[name]).norm().item() for name in names))
    size = math.hypot(*(after[name].norm().item() for name in names))
    entry = record["gradients"]["layers.0.0"]
    assert entry["update_ratio"] == pytest.approx(change / size, rel=1e-5)
    assert 1e-4 < entry["update_ratio"] < 1
    assert set(entry) == {"norm", "mean_abs", "max", "zero_share", "update_ratio"}
    assert set(record) == {"step", "gradients"}, "no module of this model tells of itself"


def test_an_update_that_is_held_back_has_a_ratio_of_zero(tmp_path: Path) -> None:
    config = make_config(log_gradient_stats=True, gradient_log_interval=1, on_nan="skip")
    model = TinyModel(0)
    model.poisonous_rows = {8}
    trainer, recorder = make_trainer(tmp_path, config, model=model)
    trainer.run(SignalGuard())
    ratios = {step: entry["norm"]["update_ratio"] for step, entry in recorder.column("gradients").items()}
    assert [step for step, ratio in ratios.items() if ratio == 0] == [3]
    assert math.isnan(recorder.column("gradients")[3]["norm"]["norm"])


def test_weights_by_block() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -4.0]]))
        layer.bias.fill_(12.0)
    named = [(f"layers.0.mixer.{name}", parameter) for name, parameter in layer.named_parameters()]
    assert weight_statistics(named) == {"layers.0.mixer": {"norm": pytest.approx(13.0), "max": 12.0}}


@pytest.mark.parametrize("shape", [(7, 5), (3, 16, 8)])
def test_ternary_shares_count_the_ternary_weight(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    ternary = ternary_ste(weight)
    shares = ternary_shares(weight)
    assert shares["ternary_zero"].item() == pytest.approx((ternary == 0).float().mean().item(), abs=1e-6)
    assert shares["ternary_positive"].item() == pytest.approx((ternary > 0).float().mean().item(), abs=1e-6)


def test_blocks_tell_what_they_retain_and_what_is_ternary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"hidden_size": 32, "num_heads": 2, "retention_heads": 2, "num_layers": 4, "vocab_size": 64}
        | {"layer_pattern": ["retnet", "mamba", "titan_attn", "standard_attn"], "use_bitnet": True, "use_moe": True}
        | {"ffn_hidden_size": 32}
    )
    model = build_model(config)
    told = module_statistics(model)
    assert told["layers.0.mixer"]["retained_tokens"] == pytest.approx(
        (1 / -math.log(31 / 32) + 1 / -math.log(63 / 64)) / 2
    )
    mamba = told["layers.1.mixer"]
    assert 1e-3 < mamba["step"] < 1e-1
    assert 0 < mamba["forget"] < 1
    assert 1 / (16 * 0.1) < mamba["retained_tokens"] < 1000
    titan = told["layers.2.mixer"]
    assert titan["forget"] == pytest.approx(1 / (1 + math.exp(6)), rel=1e-3)
    assert titan["momentum"] == pytest.approx(1 / (1 + math.exp(-1.4)), rel=1e-3)
    assert titan["retained_tokens"] == pytest.approx(1 + math.exp(6), rel=1e-3)
    for block in ("layers.0.mixer", "layers.3.mixer", "layers.0.ffn"):
        assert 0.2 < told[block]["ternary_zero"] < 0.45
        assert told[block]["ternary_positive"] == pytest.approx((1 - told[block]["ternary_zero"]) / 2, abs=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    record = BlockReport(model, list(model.named_parameters())).read()
    assert record["blocks"] == told
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path, 0)
    board.write({"step": 1, **record})
    board.close()
    assert b"blocks/layers.1.mixer/step" in next((tmp_path / "tensorboard").iterdir()).read_bytes()


def test_a_model_without_ternary_weights_tells_no_shares() -> None:
    assert module_statistics(nn.Sequential(nn.Linear(2, 2))) == {}
    assert set(module_statistics(nn.Sequential(BitLinear(4, 4)))["0"]) == {"ternary_zero", "ternary_positive"}


def test_a_spike_is_told_once_and_noise_or_a_fall_is_not() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = (0.2 * torch.randn(3000, generator=draw)).tolist()
    quiet = LossWatch()
    falling = [4 + 6 * math.exp(-step / 300) + value for step, value in enumerate(noise)]
    assert not any(quiet.look(step + 10, falling[step : step + 10]) for step in range(0, 3000, 10))
    assert LossWatch().look(5, [1, 1, 1, 1, 99.0]) is None, "too early to tell"
    found = quiet.look(3010, [4.0] * 4 + [9.0, 12.0, math.nan] + [4.0] * 3)
    assert found is not None
    assert (found["step"], found["loss"]) == (3006, 12.0)
    assert found["median"] == pytest.approx(4.0, abs=0.1)
    assert 5 < found["limit"] < 7
    assert quiet.look(3020, [9.0] * 10) is None, "it is still the same one"
    assert quiet.look(3030, [4.0] * 10) is None
    again = LossWatch()
    again.load_state_dict(quiet.state_dict())
    assert again.look(3040, [4.0] * 9 + [9.0]) == quiet.look(3040, [4.0] * 9 + [9.0]) is not None


def test_a_collapsed_router_is_told_by_layer_and_expert() -> None:
    watch = RouterWatch(top_k=2)
    fine, idle = [0.3, 0.2, 0.25, 0.25], [0.5, 0.3, 0.2, 0.0]
    lines = [watch.look({"moe_load": [fine, idle], "other": [1.0], "total_load": 3.0}) for _ in range(12)]
    assert [step for step, found in enumerate(lines) if found] == [9]
    assert lines[9] == [
        "moe_load of layer 1: almost no token visits expert 3",
        "moe_load of layer 1: almost every token visits expert 0",
    ]
    state = watch.state_dict()
    resumed = RouterWatch(top_k=2)
    resumed.load_state_dict(state)
    assert resumed.look({"moe_load": [fine, idle]}) == []
    dense = RouterWatch(top_k=2)
    assert not any(dense.look({"moe_load": [[0.5, 0.5]]}) for _ in range(20)), "every token visits both"


def test_a_run_says_and_records_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwell(TinyModel):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            if self.training and self.calls == 50:
                output.loss_sum = output.loss_sum * 5
            output.stats = {"moe_load": torch.tensor([[0.9, 0.1, 0.0, 0.0]])}
            return output

    config = make_config(max_steps=60, log_every_n_steps=4, learning_rate=1e-4)
    trainer, recorder = make_trainer(tmp_path, config, model=Unwell(0))
    trainer.watch = Watch(top_k=1)
    trainer.run(SignalGuard())
    [(step, spike)] = recorder.column("loss_spike").items()
    assert (step, spike["step"]) == (52, 50)
    assert spike["loss"] > 3 * spike["median"]
    [(step, line)] = recorder.column("router_collapse").items()
    assert step == 40
    console = trainer.display._console  # type: ignore[attr-defined]
    assert isinstance(console, Console)
    assert isinstance(console.file, io.StringIO)
    for words in ("warning: step 50: the loss has a spike of", f"warning: step 40: router collapse: {line}"):
        assert words in console.file.getvalue()


def test_a_nan_is_the_largest_value_of_its_block() -> None:
    layer = nn.Linear(2, 1)
    named = [(f"layers.0.mixer.{name}", parameter) for name, parameter in layer.named_parameters()]
    for order in (named, named[::-1]):
        layer.weight.grad, layer.bias.grad = torch.tensor([[1.0, math.nan]]), torch.ones(1)
        assert math.isnan(gradient_statistics(order)["layers.0.mixer"]["max"])
        with torch.no_grad():
            layer.weight[0, 0] = math.nan
        assert math.isnan(weight_statistics(order)["layers.0.mixer"]["max"])


def test_steps_without_a_target_have_no_loss_and_count_for_nothing() -> None:
    window, one, zero = Window(), torch.tensor(1.0), torch.tensor(0.0)
    window.add({"targets": 2 * one, "loss_sum": 6 * one, "aux": one})
    window.add({"targets": zero, "loss_sum": zero, "aux": 3 * one})
    assert window.means() == {"loss": 3.0, "aux": 2.0}
    assert window.losses == [3.0]
    window.add({"targets": zero, "loss_sum": zero, "aux": one})
    means = window.means()
    assert math.isnan(means["loss"]) and means["aux"] == 1.0
    assert window.losses == []


def test_means_leave_out_steps_that_are_not_finite_and_keep_their_losses() -> None:
    window, one = Window(), torch.tensor(1.0)
    for loss in (2.0, math.nan, 4.0):
        window.add({"targets": 2 * one, "loss_sum": loss * one, "aux": one})
    assert window.means() == {"loss": 1.5, "aux": 1.0}
    assert window.losses[::2] == [1.0, 2.0]
    assert math.isnan(window.losses[1])
    window.add({"targets": one, "loss_sum": one, "aux": math.inf * one})
    assert math.isnan(window.means()["loss"])
