"""One step is what its equation says, whatever the micro-batches; NaN never reaches the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_parts import Recorder, RowData, TinyModel, make_config, make_trainer, rows

from ultrazoo.errors import DataError, NonFiniteError
from ultrazoo.train.amp import Precision
from ultrazoo.train.loop import Trainer
from ultrazoo.train.signals import SignalGuard
from ultrazoo.train.statistics import block_of, gradient_statistics


def run(trainer: Trainer) -> None:
    trainer.run(SignalGuard())


def steps(tmp_path: Path, count: int, **training: Any) -> tuple[Trainer, Recorder]:
    """A trainer without dropout after a number of steps."""
    trainer, recorder = make_trainer(tmp_path, make_config(**training), model=TinyModel(dropout=0.0))
    trainer._batches = trainer.data.train_batches()
    for _ in range(count):
        trainer.step()
    return trainer, recorder


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_two_rows_four_times_are_eight_rows_once(tmp_path: Path) -> None:
    whole, _ = steps(tmp_path, 5, batch_size=8)
    parts, _ = steps(tmp_path, 5, batch_size=2, gradient_accumulation_steps=4)
    counts = [int((rows(index, 2).labels != -100).sum()) for index in range(0, 8, 2)]
    assert len(set(counts)) > 1, "the micro-batches must differ in targets for this test to tell"
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(parts.window.means()["loss"], whole.window.means()["loss"], rtol=1e-6, atol=0)
    assert parts.progress.tokens == whole.progress.tokens


def test_the_gradient_is_that_of_the_mean_over_targets_plus_the_auxiliary_losses(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, make_config(max_grad_norm=0.0), model=TinyModel(dropout=0.0))
    batch = rows(0, 4)
    output = trainer.model(batch.input_ids, batch.segments, batch.labels)
    objective = output.loss_sum / int((batch.labels != -100).sum()) + output.losses["balance_loss"]
    expected = torch.autograd.grad(objective, [parameter for _, parameter in trainer.parameters])
    trainer._backward([batch])  # type: ignore[list-item]
    for (name, parameter), gradient in zip(trainer.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_the_gradient_is_clipped_and_the_record_has_the_norm_before(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, make_config(max_grad_norm=0.01), model=TinyModel(dropout=0.0))
    seen: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(float(nn.utils.get_total_norm([p.grad for _, p in trainer.parameters])))
    )
    trainer._batches = trainer.data.train_batches()
    trainer.step()
    assert trainer._norm.item() > 0.1
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_the_loss_falls_and_records_come_at_their_intervals(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, make_config(max_steps=80, log_every_n_steps=9, eval_every_n_steps=40))
    run(trainer)
    losses = recorder.column("loss")
    assert list(losses) == [*range(9, 80, 9), 80]
    assert losses[80] < losses[9] - 0.3
    assert list(recorder.column("validation_loss")) == [40, 80]
    last = recorder.records[-2]
    assert last["step"] == 80
    assert last["tokens"] == trainer.progress.tokens == sum(rows(index, 1).num_tokens for index in range(320))
    assert last["stats"] == {"load": [0.25, 0.75], "moe_load": [[0.125, 0.375, 0.25, 0.25], [0.25] * 4]}
    assert set(last) >= {"lr", "grad_norm", "tokens_per_second", "balance_loss", "epoch", "memory_bytes", "seconds"}
    result = trainer.result(tmp_path)
    assert result["validation_perplexity"] == pytest.approx(math.exp(result["validation_loss"]))
    assert result["checkpoint"] == str(tmp_path / "step-000080")
    assert result["best_checkpoint"] is not None
    assert 0 <= result["data_wait_share"] < 1


def test_validation_counts_every_target_once_and_leaves_dropout_out(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, model=TinyModel(dropout=0.5))
    trainer.validate(SignalGuard())
    trainer.validate(SignalGuard())
    first, second = recorder.records
    assert first == second
    targets = sum(int((batch.labels != -100).sum()) for batch in trainer.data.validation_batches())
    assert first["validation_targets"] == targets
    assert trainer.model.training


def test_a_nan_at_a_checked_step_stops_before_the_update(tmp_path: Path) -> None:
    model = TinyModel(dropout=0.0)
    trainer, _ = make_trainer(tmp_path, make_config(checkpoint_every_n_steps=2, nan_check_interval=1), model=model)
    model.poisoned_calls = {4}
    with pytest.raises(NonFiniteError, match=r"step 4: loss nan.*last good checkpoint: .*step-000002") as caught:
        run(trainer)
    assert caught.value.exit_code == 3
    clean, _ = steps(tmp_path / "clean", 3)
    for name, value in weights(clean).items():
        assert torch.equal(weights(trainer)[name], value), name


def test_between_checks_a_nan_step_is_left_out_and_told_at_the_next_check(tmp_path: Path) -> None:
    model = TinyModel()
    trainer, _ = make_trainer(
        tmp_path, make_config(nan_check_interval=5, eval_every_n_steps=50, checkpoint_every_n_steps=50), model=model
    )
    model.poisoned_calls = {2}
    with pytest.raises(NonFiniteError, match=r"step 2: .*found at the check of step 5"):
        run(trainer)
    assert trainer.progress.step == 5
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())
    assert trainer.store.complete() == []


def test_a_checkpoint_due_before_the_check_is_not_written_after_a_nan(tmp_path: Path) -> None:
    model = TinyModel()
    trainer, _ = make_trainer(tmp_path, make_config(nan_check_interval=1000, eval_every_n_steps=100), model=model)
    model.poisoned_calls = {6}
    with pytest.raises(NonFiniteError, match="step 6"):
        run(trainer)
    assert [path.name for path in trainer.store.complete()] == ["step-000004"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer, _ = steps(tmp_path, 1)
    with torch.no_grad():
        trainer.model.norm.bias[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"norm\.bias holds values that are not finite"):
        trainer.save()
    assert trainer.store.complete() == []


def test_bfloat16_trains_and_stays_near_float32(tmp_path: Path) -> None:
    exact, _ = steps(tmp_path, 4)
    mixed, _ = steps(tmp_path, 4, use_amp=True)
    assert mixed.precision.dtype == torch.bfloat16
    exact_loss, mixed_loss = exact.window.means()["loss"], mixed.window.means()["loss"]
    assert exact_loss != mixed_loss
    assert mixed_loss == pytest.approx(exact_loss, rel=0.02)


def test_float16_is_scaled_an_overflow_skips_the_step_and_a_storm_stops_the_run(tmp_path: Path) -> None:
    trainer, _ = steps(tmp_path, 0)
    trainer.precision = Precision(trainer.device, torch.float16)
    before = weights(trainer)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    trainer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert trainer.precision.scaler.get_scale() == 2.0**39
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    trainer.step()
    assert not torch.equal(weights(trainer)["head.weight"], before["head.weight"])
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    with pytest.raises(NonFiniteError, match="overflow"):
        trainer.step()


def test_gradient_statistics_per_block_equal_the_plain_formulas(tmp_path: Path) -> None:
    recorder = steps(tmp_path, 4, log_gradient_stats=True, gradient_log_interval=2)[1]
    assert [(r["step"], sorted(r["gradients"])) for r in recorder.records] == [
        (step, ["embeddings", "head", "layers.0.0", "norm"]) for step in (2, 4)
    ]
    layer = nn.Linear(3, 2)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 0, -4], [0, 0, 0]]), torch.tensor([0.0, 12.0])
    named = [(f"layers.0.mixer.{name}", parameter) for name, parameter in layer.named_parameters()]
    found = gradient_statistics(named)["layers.0.mixer"]
    assert found == pytest.approx({"norm": 13.0, "mean_abs": 19 / 8, "max": 12.0, "zero_share": 5 / 8})
    assert block_of("head.bias") == "head"


def test_a_time_budget_ends_the_run_and_is_kept_across_a_resume(tmp_path: Path) -> None:
    config = make_config(max_steps=None, max_minutes=0.5 / 60, eval_every_n_steps=10**6, checkpoint_every_n_steps=10**6)
    trainer, recorder = make_trainer(tmp_path, config)
    run(trainer)
    rates = list(recorder.column("lr").values())
    assert 0.5 <= trainer.progress.elapsed_seconds < 5
    assert rates.index(max(rates)) < len(rates) / 2
    assert rates[-1] < 0.1 * max(rates)
    again, _ = make_trainer(tmp_path, config)
    again.restore(trainer.store.complete()[-1])
    run(again)
    assert again.progress.step == trainer.progress.step


def test_data_that_ends_is_an_error(tmp_path: Path) -> None:
    data = RowData(4)
    data.train_batches = lambda: iter([rows(0, 4)])  # type: ignore[method-assign]
    trainer, _ = make_trainer(tmp_path, data=data)
    with pytest.raises(DataError, match="ended before the run did"):
        run(trainer)
