"""A NaN, once or again and again, under each policy: never in a weight, never in a checkpoint, always counted."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import Recorder, RowData, TinyModel, make_config, make_trainer

from ultrazoo.errors import CheckpointError, NonFiniteError
from ultrazoo.train import flight, loop
from ultrazoo.train.amp import Precision
from ultrazoo.train.checkpoint import read_state
from ultrazoo.train.display import final_table
from ultrazoo.train.health import FiniteGuard
from ultrazoo.train.loop import Trainer
from ultrazoo.train.signals import SignalGuard, StoppedError

QUIET = {"eval_every_n_steps": 50, "checkpoint_every_n_steps": 50}


def start(
    folder: Path, *bad_steps: int, dropout: float = 0.0, data: RowData | None = None, **training: Any
) -> tuple[Trainer, Recorder]:
    """A trainer whose batches (of 4 rows) of these steps, counted from the first, have a loss of NaN."""
    model = TinyModel(dropout)
    model.poisonous_rows = {4 * (step - 1) + 1 for step in bad_steps}
    return make_trainer(folder, make_config(**training), model=model, data=data)


def run(trainer: Trainer) -> None:
    with SignalGuard() as guard:
        trainer.run(guard)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def said(trainer: Trainer) -> str:
    return str(trainer.display._console.file.getvalue())  # type: ignore[attr-defined]


def watch_steps(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Weights after each step of a run."""
    after: dict[int, dict[str, torch.Tensor]] = {}
    take = Trainer.step

    def step(self: Trainer) -> None:
        take(self)
        after[self.progress.step] = weights(self)

    monkeypatch.setattr(Trainer, "step", step)
    return after


@pytest.mark.parametrize(("interval", "held"), [(1, {4}), (3, {4, 5, 6}), (7, {4, 5, 6, 7})])
@pytest.mark.parametrize("fused", [True, False])
def test_skip_leaves_out_the_updates_from_the_bad_step_to_the_look_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int, held: set[int], fused: bool
) -> None:
    monkeypatch.setattr(loop, "skips_on_device", lambda _: fused)
    trainer, recorder = start(tmp_path, 4, on_nan="skip", nan_check_interval=interval, max_steps=10, **QUIET)
    after = watch_steps(trainer, monkeypatch)
    run(trainer)
    assert {step for step in range(2, 11) if equal(after[step], after[step - 1])} == held
    assert all(bool(torch.isfinite(value).all()) for value in after[10].values())
    assert trainer.progress.skipped_steps == len(held)
    assert recorder.column("skipped_steps")[10] == len(held)
    assert all(map(math.isfinite, recorder.column("loss").values()))
    [(step, entry)] = recorder.column("not_finite").items()
    assert (step, entry) == (max(held), {"first": 4, "bad_steps": 1, "held_updates": len(held), "action": "skip"})
    assert "warning: step 4: loss nan" in said(trainer)
    table = final_table({**trainer.result(tmp_path)})
    assert "skipped steps" in [str(cell) for cell in table.columns[0].cells]
    assert read_state(tmp_path / "step-000010")["progress"]["skipped_steps"] == len(held)


def test_looking_into_a_fault_changes_nothing_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"on_nan": "skip", "nan_check_interval": 2, "gradient_accumulation_steps": 2, "batch_size": 2, **QUIET}
    looked, _ = start(tmp_path / "a", 3, dropout=0.4, **settings)
    run(looked)
    assert (tmp_path / "a" / "flight" / "step-000003").is_dir()
    monkeypatch.setattr(flight.FlightRecorder, "write", lambda *_, **__: (None, None))
    not_looked, _ = start(tmp_path / "b", 3, dropout=0.4, **settings)
    run(not_looked)
    assert equal(weights(looked), weights(not_looked))


def test_a_run_that_skipped_resumes_to_the_bit(tmp_path: Path) -> None:
    settings = {"on_nan": "skip", "nan_check_interval": 4, "dropout": 0.3, "max_steps": 10}
    straight, expected = start(tmp_path / "straight", 3, **settings)
    run(straight)
    first, records = start(tmp_path / "broken", 3, **settings)
    hook = first.model.register_forward_pre_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if first.progress.step == 6 else None
    )
    with pytest.raises(StoppedError):
        run(first)
    hook.remove()
    second, more = start(tmp_path / "broken", 3, **settings)
    second.restore(tmp_path / "broken" / "step-000006")
    run(second)
    assert equal(weights(straight), weights(second))
    assert second.progress.skipped_steps == straight.progress.skipped_steps == 2
    assert {**records.column("loss"), **more.column("loss")} == expected.column("loss")


def test_a_checkpoint_between_a_skipped_step_and_the_next_record_is_written_and_read(tmp_path: Path) -> None:
    settings = {"on_nan": "skip", "nan_check_interval": 1, "log_every_n_steps": 10, "max_steps": 10}
    trainer, records = start(tmp_path, 3, **settings, checkpoint_every_n_steps=4)
    run(trainer)
    second, more = start(tmp_path / "more", 3, **settings)
    second.restore(tmp_path / "step-000004")
    run(second)
    assert more.column("loss") == records.column("loss")
    assert math.isfinite(records.column("loss")[10])


def test_too_many_bad_steps_in_a_row_end_a_run_that_skips(tmp_path: Path) -> None:
    trainer, _ = start(tmp_path, 2, 3, 5, 6, 7, 8, on_nan="skip", nan_limit=3, checkpoint_every_n_steps=4)
    with pytest.raises(NonFiniteError, match=r"step 7: loss nan.*3 steps in a row.*weights are those of step 6") as end:
        run(trainer)
    assert end.value.exit_code == 3
    assert trainer.progress.skipped_steps == 4
    assert [path.name for path in trainer.store.complete()] == ["step-000004"]
    assert (tmp_path / "flight" / "step-000007").is_dir(), "the stop is recorded, however many were before"
    assert len(list((tmp_path / "flight").iterdir())) == flight.KEPT


def test_a_streak_goes_on_after_a_resume(tmp_path: Path) -> None:
    bad = (3, 4, 5, 6)
    options = {"on_nan": "skip", "nan_limit": 3, "checkpoint_every_n_steps": 4, "eval_every_n_steps": 50}
    straight, _ = start(tmp_path / "straight", *bad, **options)
    with pytest.raises(NonFiniteError, match=r"step 5: loss nan.*3 steps in a row"):
        run(straight)
    resumed, _ = start(tmp_path / "straight", *bad, **options)
    resumed.restore(tmp_path / "straight" / "step-000004")
    with pytest.raises(NonFiniteError, match=r"step 5: loss nan.*3 steps in a row"):
        run(resumed)


def test_rollback_goes_back_to_the_checkpoint_and_past_the_bad_batch(tmp_path: Path) -> None:
    trainer, recorder = start(tmp_path, 7, on_nan="rollback", nan_check_interval=2)
    run(trainer)
    model = trainer.model
    assert isinstance(model, TinyModel)
    assert model.poisoned == [25, 25], "once in the run and once under the watch of the flight recorder"
    assert (trainer.progress.step, trainer.progress.rollbacks, trainer.progress.skipped_steps) == (12, 1, 0)
    assert trainer.data.next_row == 4 * (8 + 8)  # 8 steps before the look, then 5 to 12 anew
    assert recorder.column("not_finite")[8]["action"] == "rollback"
    assert f"going back to {tmp_path / 'step-000004'}" in said(trainer)
    assert [path.name for path in trainer.store.complete()] == ["step-000004", "step-000008", "step-000012"]
    clean, _ = start(tmp_path / "clean", data=RowData(4))
    clean.restore(tmp_path / "step-000004")
    clean.data.next_row = 4 * 8
    run(clean)
    assert equal(weights(trainer), weights(clean))


@pytest.mark.parametrize(("bad", "interval"), [(12, 1), (11, 50), (12, 5)])
def test_rollback_at_the_last_step_goes_on_to_the_end(tmp_path: Path, bad: int, interval: int) -> None:
    trainer, _ = start(tmp_path, bad, on_nan="rollback", nan_check_interval=interval)
    run(trainer)
    assert (trainer.progress.step, trainer.progress.rollbacks) == (12, 1)
    assert [path.name for path in trainer.store.complete()] == ["step-000004", "step-000008", "step-000012"]
    assert trainer.data.next_row == 4 * 16


def test_rollback_needs_a_checkpoint_and_ends_when_it_does_not_help(tmp_path: Path) -> None:
    early, _ = start(tmp_path / "early", 3, on_nan="rollback")
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan.*rollback, but no checkpoint is written yet"):
        run(early)
    late, _ = start(tmp_path / "late", *range(6, 40), on_nan="rollback", nan_limit=2)
    with pytest.raises(NonFiniteError, match=r"step 5: .* again, after 2 rollbacks to it .*checkpoint: .*step-000004"):
        run(late)
    assert late.progress.rollbacks == 2
    assert [path.name for path in late.store.complete()] == ["step-000004"]
    assert late.data.next_row == 4 * (6 + 1 + 1)


def test_a_damaged_checkpoint_is_passed_over_by_a_rollback(tmp_path: Path) -> None:
    trainer, _ = start(tmp_path, 10, on_nan="rollback")

    def damage(*_: Any) -> None:
        if trainer.progress.step == 10:
            (tmp_path / "step-000008" / "model.safetensors").write_bytes(b"")

    hook = trainer.model.register_forward_pre_hook(damage)
    run(trainer)
    hook.remove()
    assert "set aside as step-000008.damaged" in said(trainer)
    assert f"going back to {tmp_path / 'step-000004'}" in said(trainer)
    assert trainer.progress.step == 12


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_validation_that_is_not_finite_ends_the_run_and_says_what_to_do(tmp_path: Path, policy: str) -> None:
    trainer, _ = start(tmp_path, on_nan=policy)

    def lose(module: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        return output if module.training or trainer.progress.step < 8 else output * math.inf

    trainer.model.head.register_forward_hook(lose)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match=r"step 8: validation: the loss is nan.*good checkpoint: \S+4$") as end:
        run(trainer)
    assert end.value.exit_code == 3 and "and continue with --resume auto" in str(end.value)
    assert [path.name for path in trainer.store.complete()] == ["step-000004"]
    assert not (tmp_path / "flight").exists()


def test_a_bad_step_is_never_the_best(tmp_path: Path) -> None:
    trainer, _ = start(tmp_path, 4, 8, on_nan="skip", nan_check_interval=50)
    run(trainer)
    for path in trainer.store.complete():
        assert math.isfinite(read_state(path)["validation_loss"])
        assert math.isfinite(read_state(path)["progress"]["train_loss"])
    assert trainer.progress.skipped_steps == 2, "a checkpoint is a look too"


def test_an_overflow_that_the_scaler_skips_is_no_nan_but_a_bad_loss_is(tmp_path: Path) -> None:
    trainer, _ = start(tmp_path, 2, on_nan="skip", nan_check_interval=10)
    trainer.precision = Precision(trainer.device, torch.float16)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    trainer._batches = trainer.data.train_batches()
    trainer.step()
    assert trainer.finite.look(1) is None
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    before = weights(trainer)
    trainer.step()
    trainer.step()
    assert equal(before, weights(trainer)), "step 3 is finite, but held back until the look"
    assert trainer.settle() is False
    assert trainer.progress.skipped_steps == 2
    trainer.step()
    assert not equal(before, weights(trainer))


def test_the_guard_counts_streaks_across_looks() -> None:
    guard, good, nan = FiniteGuard(4, torch.device("cpu")), torch.tensor(1.0), torch.tensor(math.nan)
    holds = [guard.mark(step, loss, good).item() for step, loss in enumerate((good, nan, good, nan), start=1)]
    assert holds == [0, 1, 1, 1]
    first = guard.look(4)
    assert first is not None
    assert (first.step, first.bad, first.streak, first.held) == (2, 2, 1, 3)
    assert guard.mark(5, good, nan).item() == 1
    second = guard.look(5)
    assert second is not None
    assert (second.step, second.streak) == (5, 2)
    guard.forgive()
    assert guard.mark(6, good, good).item() == 0
    assert guard.look(6) is None


def test_a_full_disk_does_not_hide_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("flight/step-000002: cannot be written: no space left on device")

    monkeypatch.setattr(flight, "publish", full)
    trainer, _ = start(tmp_path, 2)
    with pytest.raises(NonFiniteError, match=r"step 2: loss nan.*no flight record: .*no space left"):
        run(trainer)
