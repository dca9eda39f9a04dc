"""The learning rate follows its shape, and a run ends where its limits say."""

from __future__ import annotations

import pytest

from ultrazoo.config import TrainingConfig
from ultrazoo.train.schedule import learning_rate_factor, make_plan

SHAPES = ("linear", "cosine", "wsd", "constant")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_warm_up_rises_in_a_straight_line(shape: str) -> None:
    rise = [learning_rate_factor(share, shape=shape, warmup_ratio=0.2) for share in (0.0, 0.05, 0.1, 0.15, 0.2)]
    assert rise == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1.0, 0.868198, 0.55, 0.231802, 0.1]),
        ("wsd", [1.0, 1.0, 1.0, 0.55, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_after_the_warm_up_each_shape_falls_its_own_way(shape: str, expected: list[float]) -> None:
    shares = [0.2, 0.4, 0.6, 0.8, 1.0]
    factors = [
        learning_rate_factor(share, shape=shape, warmup_ratio=0.2, decay_ratio=0.4, floor=0.1) for share in shares
    ]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_beyond_the_end_the_last_value_holds(shape: str) -> None:
    values = [learning_rate_factor(share, shape=shape, warmup_ratio=0.0, floor=0.05) for share in (1.0, 1.7)]
    assert values[0] == values[1]


def test_steps_come_from_the_rows_and_the_epochs() -> None:
    training = TrainingConfig(batch_size=8, gradient_accumulation_steps=2, num_epochs=1.5)
    assert make_plan(training, 1000).total_steps == 94  # ceil(1500 / 16)
    assert make_plan(training, 3).total_steps == 1


def test_max_steps_and_max_minutes_replace_the_epochs_and_the_first_limit_ends_the_run() -> None:
    plan = make_plan(TrainingConfig(max_steps=200, max_minutes=2.0), 1000)
    assert (plan.total_steps, plan.max_seconds, plan.num_epochs) == (200, 120.0, None)
    assert plan.share(50, 30.0, 9.0) == 0.25
    assert plan.share(50, 90.0, 9.0) == 0.75
    assert plan.share(200, 30.0, 9.0) == 1.0
    only_clock = make_plan(TrainingConfig(max_minutes=2.0), 1000)
    assert only_clock.total_steps is None
    assert only_clock.share(10**9, 60.0, 9.0) == 0.5


def test_uncounted_rows_leave_the_epoch_as_the_measure() -> None:
    plan = make_plan(TrainingConfig(num_epochs=2.0), None)
    assert plan.total_steps is None
    assert plan.share(123, 456.0, 0.5) == 0.25
    assert plan.share(123, 456.0, 2.0) == 1.0


def test_no_step_is_idle_and_the_time_budget_sets_the_rate() -> None:
    training = TrainingConfig(max_steps=4, warmup_ratio=0.5, learning_rate=1.0)
    plan = make_plan(training, None)
    assert [plan.learning_rate(step, 0.0, 0.0) for step in range(4)] == pytest.approx([0.25, 0.75, 0.75, 0.25])
    timed = make_plan(TrainingConfig(max_minutes=1.0, warmup_ratio=0.5, learning_rate=1.0), None)
    assert [timed.learning_rate(7, seconds, 0.0) for seconds in (15.0, 30.0, 45.0)] == pytest.approx([0.5, 1.0, 0.5])
