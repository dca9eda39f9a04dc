"""metrics.jsonl over faults: each record once, in the order of the run; damage costs a line, never the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import write_config
from rich.console import Console
from test_verify import change_state

from ultrazoo.config import load_config
from ultrazoo.errors import UltrazooError
from ultrazoo.train import records as records_module
from ultrazoo.train import train
from ultrazoo.train.loop import Trainer
from ultrazoo.train.metrics import JsonLines
from ultrazoo.train.records import read_lines, set_aside, take_over
from ultrazoo.train.signals import StoppedError
from ultrazoo.train.verify import TIMED, verify_run


class KilledError(Exception):
    """Ends a run without a checkpoint, as a kill would."""


Train = Callable[..., str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("text"))


@pytest.fixture
def start(config: Path) -> Train:
    """Begins or continues a run in a folder, and returns what it said."""

    def start(folder: Path, **training: Any) -> str:
        sets = [f"training.{name}={json.dumps(value)}" for name, value in training.items()]
        console = Console(file=StringIO(), width=250)
        train(load_config(str(config), sets).config, run_dir=folder, resume="auto", console=console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    return start


def at_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Trainer], None]) -> None:
    """Act once, after the backward pass of a batch of the first epoch, counted from 1."""
    backward = Trainer._backward

    def changed(self: Trainer, batches: Any, totals: Any = None) -> None:
        backward(self, batches, totals)
        if (self.data._position[0], self.data._position[2]) == (0, 4 * number):
            act(self)

    monkeypatch.setattr(Trainer, "_backward", changed)


def kill(trainer: Trainer) -> None:
    raise KilledError


def stop(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def spoil(trainer: Trainer) -> None:
    gradient = trainer.parameters[0][1].grad
    assert gradient is not None
    gradient.view(-1)[0] = torch.nan


def untimed(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def test_a_validation_cut_short_is_recorded_once_though_the_run_dies_after_it(
    start: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="after step 3"):
        at_batch(patch, 3, stop)  # seen by the first poll, which is that of the step, as in a long validation
        patch.setattr("ultrazoo.train.loop.evaluate", lambda *_: None)
        start(tmp_path / "run")
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            at_batch(patch, 5, kill)
            start(tmp_path / "run")
    start(tmp_path / "run")
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")


ROLLBACK = {"on_nan": "rollback", "nan_check_interval": 50, "checkpoint_every_n_steps": 5, "eval_every_n_steps": 50}


@pytest.mark.parametrize("tensorboard", [False, True])
def test_records_before_a_rollback_are_kept_and_none_comes_twice(
    start: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: bool
) -> None:
    settings: dict[str, Any] = {**ROLLBACK, "max_steps": 9, "max_rolling_checkpoints": 9}
    if tensorboard:
        pytest.importorskip("tensorboard")
        settings["report_to"] = ["tensorboard"]
    at_batch(monkeypatch, 8, spoil)
    start(tmp_path / "straight", **settings)  # the look at step 9 goes back to step 5
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="after step 6"):
        at_batch(patch, 10, stop)
        start(tmp_path / "run", **settings)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        at_batch(patch, 12, kill)
        start(tmp_path / "run", **settings)
    start(tmp_path / "run", **settings)
    made = untimed(tmp_path / "run")
    assert made == untimed(tmp_path / "straight")
    assert [record["step"] for record in made] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 6, 7, 8, 9, 9]
    assert [record["step"] for record in made if "not_finite" in record] == [9]
    found = verify_run(tmp_path / "run")
    assert (found.start, found.first_difference) == ("step-000006", None), "steps given up are not compared"
    if tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for name in ("straight", "run"):
            board = EventAccumulator(str(tmp_path / name / "tensorboard"), size_guidance={"scalars": 0})
            board.Reload()
            assert sorted(event.step for event in board.Scalars("loss")) == [1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9]
            assert len(board.Scalars("not_finite/first")) == len(board.Scalars("validation_loss")) == 1


def test_without_the_mark_or_without_its_record_the_step_decides(start: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, checkpoint_every_n_steps=3)
    lines = read_lines(run / "metrics.jsonl")
    newest = run / "checkpoints/step-000006"
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines[:3]))  # a power cut took the others
    said: list[str] = []
    assert [record["step"] for record in take_over(newest, run / "metrics.jsonl", said.append)] == [1, 2, 3]
    assert len(said) == 1 and "lacks the last record before checkpoint 6; those of no later step" in said[0]
    said.clear()
    oldest = run / "checkpoints/step-000003"
    change_state(oldest, records=None)  # of an earlier version
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [record["step"] for record in take_over(oldest, run / "metrics.jsonl", said.append)] == [1, 2, 3, 3]
    assert not said and read_lines(run / "metrics.jsonl") == lines[:4]


def test_damaged_lines_cost_themselves_one_warning_and_no_other_record(start: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, max_steps=3)
    lines = read_lines(run / "metrics.jsonl")
    damaged = [lines[0], b"\xff", b'{"step": "a"}', b"[1]", *lines[1:], b"\xff", b'{"step": 4, "lo']
    (run / "metrics.jsonl").write_bytes(b"\n".join(damaged))
    said = start(run, max_steps=4)
    assert said.count("left out") == 1 and "metrics.jsonl: 3 damaged lines left out" in said
    assert read_lines(run / "metrics.jsonl")[: len(lines)] == lines
    assert [record["step"] for record in untimed(run)] == [1, 2, 3, 3, 4, 4]


def test_metrics_are_taken_over_in_one_piece(start: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    start(run, max_steps=1)
    branch.mkdir()
    target = branch / "metrics.jsonl"
    target.write_text("another run's\n")
    write = records_module.write_bytes

    def cut(path: Path, data: bytes) -> None:
        if path == target:
            raise KilledError
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(records_module, "write_bytes", cut)
        take_over(run / "checkpoints/step-000001", target, print)
    assert target.read_text() == "another run's\n"
    take_over(run / "checkpoints/step-000001", target, print)
    assert target.read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (branch / "metrics.1.jsonl").read_text() == "another run's\n"


def test_a_copied_checkpoint_takes_no_records_but_its_own(start: Train, tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    start(run, max_steps=2)
    saved = shutil.copytree(run / "checkpoints/step-000002", tmp_path / "saved")
    target = tmp_path / "new/metrics.jsonl"
    target.parent.mkdir()
    assert take_over(saved, target, said.append) == [] and said == []
    target.write_text('{"step": 1, "loss": 1.0}\n')
    assert take_over(saved, target, said.append) == []
    assert said == [f"metrics of another run are kept as {target.with_name('metrics.1.jsonl')}"]
    own = run / "metrics.jsonl"
    before = own.read_bytes()
    assert take_over(saved, own, said.append) and own.read_bytes() == before


def test_records_that_are_not_finite_are_null_and_an_earlier_run_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(JsonLines(path)) as writer:
        writer.write({"step": 6, "loss": float("nan")})
        assert writer.sync()["records"]["count"] == 1
    with closing(JsonLines(path)) as writer:
        assert writer.sync()["records"]["count"] == 1
    assert path.read_text() == '{"step": 6, "loss": null}\n'
    assert set_aside(path) == tmp_path / "metrics.1.jsonl"
    assert set_aside(path) is None


def test_a_full_disk_under_tensorboard_is_one_error_with_its_path(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    pytest.importorskip("tensorboard")
    from ultrazoo.train.tensorboard import TensorBoard

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(TensorBoard(tmp_path, 0)) as board:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(UltrazooError, match=r"events\.out\S+: cannot be written: .*checkpoints are intact"):
                for step in range(1000):
                    board.write({"step": step, "loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
