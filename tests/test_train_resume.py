"""N + M steps are N steps, a stop, a resume and M steps: to the bit. Another run's checkpoint is refused."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import Recorder, TinyModel, make_config, make_trainer

from ultrazoo.config import Config
from ultrazoo.errors import CheckpointError, ConfigError, UltrazooError
from ultrazoo.train.checkpoint import read_state, read_tensors
from ultrazoo.train.loop import Trainer
from ultrazoo.train.metrics import JsonLines
from ultrazoo.train.resume import check_match, find_checkpoint
from ultrazoo.train.signals import SignalGuard, StoppedError
from ultrazoo.train.store import CheckpointStore

TIMED = {"seconds", "tokens_per_second", "data_wait_share", "memory_bytes"}
HASHES = {"tokenizer_sha256": "tokenizer", "data_fingerprint": "rows"}


def stop_after(trainer: Trainer, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal in the forward pass of a step."""

    def send(*_: Any) -> None:
        if trainer.progress.step == step:
            hook.remove()
            os.kill(os.getpid(), number)

    hook = trainer.model.register_forward_pre_hook(send)


def run(trainer: Trainer) -> None:
    with SignalGuard() as guard:
        trainer.run(guard)


def untimed(recorder: Recorder) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in recorder.records]


def resumed(folder: Path, config: Config, model: TinyModel) -> tuple[Trainer, Recorder]:
    trainer, recorder = make_trainer(folder, config, model=model)
    torch.manual_seed(12345)  # what the process drew before must not matter
    start = trainer.store.newest_whole(print)
    assert start is not None
    trainer.restore(start)
    return trainer, recorder


GALORE = pytest.param(
    {"use_galore": True, "galore_rank": 3, "galore_update_interval": 4},
    id="galore",
    marks=[
        pytest.mark.optional,
        pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None, reason="galore-torch is not installed"),
    ],
)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="dropout"),
        pytest.param({"gradient_accumulation_steps": 3, "batch_size": 2}, id="accumulation"),
        pytest.param({"use_amp": True, "lr_schedule": "wsd"}, id="bfloat16"),
        GALORE,
    ],
)
@pytest.mark.parametrize("stop", [5, 8])
def test_a_stopped_and_resumed_run_is_the_unbroken_run_to_the_bit(
    tmp_path: Path, settings: dict[str, Any], stop: int
) -> None:
    config = make_config(max_steps=14, log_every_n_steps=3, **settings)
    straight, expected = make_trainer(tmp_path / "straight", config, model=TinyModel(dropout=0.3))
    run(straight)

    first, records = make_trainer(tmp_path / "broken", config, model=TinyModel(dropout=0.3))
    stop_after(first, stop)
    with pytest.raises(StoppedError) as caught:
        run(first)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert first.progress.step == stop
    second, rest = resumed(tmp_path / "broken", config, TinyModel(dropout=0.3))
    run(second)

    assert untimed(records) + untimed(rest) == untimed(expected)
    ends = [tmp_path / name / "step-000014" for name in ("straight", "broken")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file
    states = [read_state(end) for end in ends]
    for key in ("rng", "data", "window", "watch", "epoch", "validation_loss"):
        assert states[0][key] == states[1][key], key
    assert states[0]["watch"]["router"]["loads"]["moe_load"], "the loads of experts are part of the state"
    if "use_galore" in settings:
        assert any(name.endswith("/basis") for name in read_tensors(ends[1] / "optimizer.safetensors"))


def test_a_signal_during_validation_is_made_good_on_resume(tmp_path: Path) -> None:
    config = make_config(max_steps=8)
    straight, expected = make_trainer(tmp_path / "straight", config)
    run(straight)
    first, records = make_trainer(tmp_path / "broken", config)
    evaluating = first.data.validation_batches
    first.data.validation_batches = lambda: os.kill(os.getpid(), signal.SIGINT) or evaluating()  # type: ignore
    with pytest.raises(StoppedError, match="SIGINT: stopped after step 4") as caught:
        run(first)
    assert caught.value.exit_code == 130
    second, rest = resumed(tmp_path / "broken", config, TinyModel())
    run(second)
    assert untimed(records) + untimed(rest) == untimed(expected)


def test_sigusr1_writes_a_checkpoint_and_the_run_goes_on_unchanged(tmp_path: Path) -> None:
    config = make_config(max_steps=6, max_rolling_checkpoints=9)
    straight, expected = make_trainer(tmp_path / "straight", config)
    run(straight)
    asked, records = make_trainer(tmp_path / "asked", config)
    stop_after(asked, 3, signal.SIGUSR1)
    run(asked)
    assert [path.name for path in asked.store.complete()] == ["step-000003", "step-000004", "step-000006"]
    assert untimed(records) == untimed(expected)


def test_a_finished_run_resumes_to_nothing_and_a_longer_plan_goes_on(tmp_path: Path) -> None:
    first, _ = make_trainer(tmp_path, make_config(max_steps=4))
    run(first)
    done, records = resumed(tmp_path, make_config(max_steps=4), TinyModel())
    run(done)
    assert records.records == []
    assert done.result(tmp_path)["validation_loss"] == first.result(tmp_path)["validation_loss"]
    longer, records = resumed(tmp_path, make_config(max_steps=6), TinyModel())
    run(longer)
    assert list(records.column("loss")) == [6]


def store_with(folder: Path, config: Config, *steps: int, run_id: str = "run") -> CheckpointStore:
    trainer, _ = make_trainer(folder / "checkpoints", config)
    trainer.run_id = run_id
    trainer._batches = trainer.data.train_batches()
    while trainer.progress.step < max(steps):
        trainer.step()
        if trainer.progress.step in steps:
            trainer.save()
    return trainer.store


def test_where_a_run_starts(tmp_path: Path) -> None:
    lines: list[str] = []
    empty = CheckpointStore(tmp_path / "new" / "checkpoints", 1, 1)
    assert find_checkpoint(None, empty, lines.append) is None
    assert lines == []
    assert find_checkpoint("auto", empty, lines.append) is None
    assert "starting from the beginning" in lines[0]
    store = store_with(tmp_path / "run", make_config(), 2, 3)
    first, last = store.complete()
    with pytest.raises(ConfigError, match=r"already holds checkpoints .* continue with --resume auto"):
        find_checkpoint(None, store, lines.append)
    assert find_checkpoint("auto", store, lines.append) == last
    assert find_checkpoint(str(last), store, lines.append) == last
    assert find_checkpoint(str(tmp_path / "run"), empty, lines.append) == last
    assert find_checkpoint(str(first), empty, lines.append) == first
    with pytest.raises(CheckpointError, match="already goes on to step-000003"):
        find_checkpoint(str(first), store, lines.append)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find_checkpoint(str(tmp_path / "new"), store, lines.append)
    kin = store_with(tmp_path / "kin", make_config(max_steps=9, learning_rate=1.0, dataloader_workers=2), 1)
    assert find_checkpoint(str(last), kin, lines.append) == last
    (kin.complete()[0] / "state.json").write_text("{")
    assert find_checkpoint(str(last), kin, lines.append) == last, "one that cannot be read is not of another run"
    other = store_with(tmp_path / "other", make_config(), 1, run_id="another")
    with pytest.raises(ConfigError, match=r"other has checkpoints of another run \(step-000001\)"):
        find_checkpoint(str(last), other, lines.append)
    (last / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="already goes on to step-000003"):
        find_checkpoint(str(first), store, lines.append)
    with pytest.raises(CheckpointError, match=r"state\.json has 2 bytes"):
        find_checkpoint(str(last), empty, lines.append)


def test_another_model_vocabulary_tokenizer_or_data_is_refused_key_by_key(tmp_path: Path) -> None:
    config = make_config()
    folder = store_with(tmp_path, config, 1).complete()[0]
    assert check_match(folder, config, **HASHES) == []
    other = make_config(learning_rate=3e-4)
    assert check_match(folder, other, **HASHES) == ["training.learning_rate: checkpoint 0.01, this run 0.0003"]
    model = config.model.model_copy(update={"hidden_size": 16, "vocab_size": 40, "dropout": 0.0})
    with pytest.raises(CheckpointError) as caught:
        check_match(
            folder, config.model_copy(update={"model": model}), tokenizer_sha256="other", data_fingerprint="rows"
        )
    text = str(caught.value)
    assert "model.hidden_size: checkpoint 8, this run 16" in text
    assert "model.vocab_size: checkpoint 32, this run 40" in text
    assert "tokenizer_sha256: checkpoint 'tokenizer', this run 'other'" in text
    assert "dropout" not in text
    with pytest.raises(CheckpointError, match="data_fingerprint: checkpoint 'rows', this run 'more rows'"):
        check_match(folder, config, tokenizer_sha256="tokenizer", data_fingerprint="more rows")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_metrics_is_told_and_closing_the_file_does_not_hide_it() -> None:
    writer = JsonLines(Path("/dev/full"))
    with pytest.raises(UltrazooError, match=r"/dev/full: cannot be written: .*checkpoints are intact"):
        writer.write({"step": 1, "loss": 1.0})
    writer.close()
