"""``resume --verify``, ``inspect`` and ``--weights-only``: what a run folder is good for after a fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import call, write_config
from safetensors.torch import load_file, save_file

from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.train.durable import sha256
from ultrazoo.train.inspection import CheckpointReport, RunReport, inspect_path
from ultrazoo.train.verify import verify_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps with checkpoints at 3, 6 and 9, dropout and accumulation."""
    folder = tmp_path_factory.mktemp("verify")
    settings = {"max_steps": 9, "checkpoint_every_n_steps": 3, "gradient_accumulation_steps": 2}
    sets = [word for name, value in settings.items() for word in ("--set", f"training.{name}={value}")]
    assert call("train", write_config(folder), "--output-dir", folder / "run", *sets, "--set", "model.dropout=0.2") == 0
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def reseal(folder: Path) -> None:
    """Make a manifest agree with its files, as only someone who means to would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_state(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    (folder / "state.json").write_text(json.dumps(state))
    reseal(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_honest_run_comes_out_equal_and_its_folder_is_left_as_it_was(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: data for path, data in contents(run).items() if path.name != ".lock"}
    found = verify_run(run)
    assert (found.start, found.checkpoints, found.steps) == ("step-000006", ["step-000009"], 3)
    assert found.first_difference is None and found.verdict == "equal to the last bit over 3 steps"
    assert found.compared["records"] == 4 and found.compared["weights"] > 20
    assert call("resume", run, "--verify", "--steps", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == ["step-000006", "step-000009"]
    assert {path: data for path, data in contents(run).items() if path.name != ".lock"} == before


def test_with_one_checkpoint_the_run_is_taken_again_from_the_beginning(run: Path) -> None:
    for step in (3, 6):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    found = verify_run(run)
    assert (found.start, found.steps, found.first_difference) == (None, 9, None)


def test_one_changed_bit_is_named_with_its_step_and_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints/step-000009"
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[5]
    tensors[name].view(-1).view(torch.int32)[0] ^= 1
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)
    assert call("resume", run, "--verify") == 1
    told = capsys.readouterr().err
    assert f"differs: step 9: model.safetensors: {name} differs by up to" in told


def test_the_earliest_difference_is_named_though_it_is_but_a_record(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    changed = next(record for record in records if record["step"] == 8)
    changed["grad_norm"] += 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    change_state(run / "checkpoints/step-000009", scaler={"scale": 2.0})
    found = verify_run(run)
    assert found.first_step == 8 and "metrics.jsonl: grad_norm was" in str(found.first_difference)
    assert found.differ == {"parts of the state": 1, "records": 1}


def test_what_cannot_be_repeated_is_refused_with_the_reason(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify_run(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    folder = run / "checkpoints/step-000009"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"training\.learning_rate changed since step-000006"):
        verify_run(run)
    (folder / "config.yaml").write_text(config.replace("max_minutes: null", "max_minutes: 1"))
    reseal(folder)
    with pytest.raises(CheckpointError, match="max_minutes makes the learning rate follow the clock"):
        verify_run(run)


def test_a_field_that_an_earlier_version_lacked_has_its_default_there(run: Path) -> None:
    for step in (3, 6):
        path = run / f"checkpoints/step-{step:06d}/config.yaml"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "eval_mlm_probability" not in line))
        reseal(path.parent)
    found = verify_run(run)
    assert found is not None and (found.start, found.first_difference) == ("step-000006", None)


def test_resume_goes_on_with_the_runs_own_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("resume", run, "--set", "training.max_steps=10") == 0
    assert (run / "checkpoints/latest").read_text() == "step-000010\n"
    assert call("resume", run.parent / "nowhere") == 1
    assert "holds no config.yaml" in capsys.readouterr().err


def test_a_checkpoint_holds_the_receipt_that_inspect_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_path(run / "checkpoints/step-000009")
    assert isinstance(report, CheckpointReport) and report.problem is None
    receipt = report.receipt
    assert (receipt["step"], receipt["torch"], receipt["num_threads"]) == (9, torch.__version__, 1)
    assert receipt["data"]["rows"] == 100 and [
        (plugin["distribution"], plugin["version"]) for plugin in receipt["plugins"]
    ] == [("ultrazoo", receipt["ultrazoo"])]
    assert receipt["tokenizer_sha256"] == sha256(run / "tokenizer.json")
    tensors = load_file(run / "checkpoints/step-000009/model.safetensors")
    assert report.weights == sum(tensor.numel() for tensor in tensors.values())
    assert call("inspect", run / "checkpoints/step-000009") == 0
    shown = capsys.readouterr().out
    assert receipt["data"]["fingerprint"] in shown and receipt["tokenizer_sha256"] in shown
    assert call("inspect", run, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert [Path(found["path"]).name for found in whole["checkpoints"]] == [f"step-{n:06d}" for n in (3, 6, 9)]
    assert whole["latest"] == "step-000009" and whole["starts"][0]["step"] == 0


def test_inspect_finds_damage_and_says_where_nothing_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step-000006/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert call("inspect", run) == 1
    assert "step-000006: damaged: optimizer.safetensors has" in capsys.readouterr().err
    report = inspect_path(run)
    assert isinstance(report, RunReport) and len(report.problems) == 1
    (path.parent / "state.json").unlink()
    (path.parent / "receipt.json").unlink()
    path.write_bytes(b"")
    assert call("inspect", path.parent) == 1
    with pytest.raises(CheckpointError, match="holds neither a checkpoint nor a run"):
        inspect_path(run.parent)


@pytest.mark.parametrize("lost", ["rng", "data", "window", "scaler"])
def test_state_that_is_missing_refuses_an_exact_resume(
    run: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_state(run / "checkpoints/step-000009", **{lost: None})
    assert call("resume", run) == 1
    told = capsys.readouterr().err
    assert f"lacks state.json: {lost}" in told and "--weights-only" in told


def test_a_lost_optimizer_is_refused_and_its_weights_begin_a_new_run(
    run: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, last = original.parent / "tiny.yaml", run / "checkpoints/step-000009"
    save_file({}, last / "optimizer.safetensors")
    assert call("train", config, "--resume", last, "--output-dir", tmp_path / "new") == 1
    assert "optimizer.safetensors has" in (told := capsys.readouterr().err)
    assert "its weights are whole: --weights-only begins a new run" in told
    reseal(last)
    assert call("train", config, "--resume", last, "--output-dir", tmp_path / "new") == 1
    assert "lacks optimizer.safetensors: every tensor" in capsys.readouterr().err
    sets = ("--set", "training.max_steps=1", "--set", "training.learning_rate=1e-30", "--set", "model.dropout=0.0")
    arguments = ("train", config, "--resume", last, "--weights-only", *sets)
    assert call(*arguments, "--output-dir", tmp_path / "new") == 0
    before = load_file(last / "model.safetensors")
    after = load_file(tmp_path / "new/checkpoints/step-000001/model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-12) for name in before)
    start = json.loads((tmp_path / "new/env.json").read_text())["starts"][0]
    assert (start["step"], start["weights_from"]) == (0, str(last))
    capsys.readouterr()
    assert call(*arguments, "--output-dir", run) == 2
    assert "already holds checkpoints" in capsys.readouterr().err
    assert call(*arguments, "--output-dir", tmp_path / "wide", "--set", "model.ffn_hidden_size=32") == 1
    assert "model.ffn_hidden_size: checkpoint 64, this run 32" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected --resume PATH"):
        from ultrazoo.train.resume import find_weights
        from ultrazoo.train.store import CheckpointStore

        find_weights("auto", CheckpointStore(tmp_path / "none", 1, 1))


def test_a_stretch_in_which_something_changed_is_refused_from_the_beginning_too(run: Path) -> None:
    changes = ("--set", "training.max_steps=11", "--set", "training.learning_rate=0.02")
    assert call("resume", run, *changes) == 0
    for step in (3, 6, 9):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}", ignore_errors=True)
    with pytest.raises(CheckpointError, match=r"training\.learning_rate changed since the beginning"):
        verify_run(run)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_that_was_made_longer_is_verified_with_the_plan_of_each_start(
    original: Path, tmp_path: Path, schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", original.parent / "tiny.yaml"

    def go(command: str, place: Path, *given: str | Path, **training: Any) -> None:
        sets = [word for name, value in training.items() for word in ("--set", f"training.{name}={value}")]
        assert call(command, place, *given, *sets) == 0

    every = {"eval_every_n_steps": 4, "max_rolling_checkpoints": 9, "lr_schedule": schedule}
    go("train", config, "--output-dir", run, max_steps=5, log_every_n_steps=3, **every)
    go("resume", run, max_steps=7)
    go("resume", run, max_steps=11, log_every_n_steps=2)
    steps = [record["step"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert steps == [3, 4, 5, 5, 6, 7, 7, 8, 8, 10, 11, 11]
    for lost in (None, 7, 5):  # checkpoints that are there, or of which only env.json tells
        if lost is not None:
            shutil.rmtree(run / f"checkpoints/step-{lost:06d}")
        found = verify_run(run, steps=11)
        assert (found.start, found.steps, found.first_difference) == (None, 11, None)
        assert found.compared["records"] == len(steps)
    environment = json.loads((run / "env.json").read_text())
    for start in environment["starts"]:
        del start["plan"]  # as of an earlier version
    (run / "env.json").write_text(json.dumps(environment))
    with pytest.raises(CheckpointError, match=r"training\.max_steps changed since the beginning; verify a later"):
        verify_run(run, steps=11)


def test_a_run_that_streamed_is_verified_from_a_cache_that_came_later(tmp_path: Path) -> None:
    config, sets = write_config(tmp_path), ("--set", "training.max_steps=4")
    stream = ("--set", "training.stream_local_parquet=true", "--set", "training.checkpoint_every_n_steps=2")
    assert call("train", config, "--output-dir", tmp_path / "streamed", *sets, *stream) == 0
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert call("train", config, "--output-dir", tmp_path / "cached", *sets) == 0
    assert list((tmp_path / "cache").glob("*/manifest.json"))
    assert verify_run(tmp_path / "streamed", steps=4).verdict == "equal to the last bit over 4 steps"


def test_a_damaged_line_among_the_records_is_left_out_of_the_comparison(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo')
    assert verify_run(run).first_difference is None
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[-3] = b"\xff"
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    said: list[str] = []
    found = verify_run(run, say=said.append)
    assert (found.first_difference, found.compared["records"]) == (None, 3)
    assert any("1 damaged line left out" in line for line in said)


def test_weights_that_a_run_began_with_are_taken_again_when_it_is_killed_before_its_first_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new"
    assert call("train", run / "config.yaml", "--resume", "run", "--weights-only", "--output-dir", new) == 0
    made = contents(new / "checkpoints/step-000009")[Path("model.safetensors")]
    shutil.rmtree(new / "checkpoints")
    monkeypatch.chdir(run)
    capsys.readouterr()
    assert call("resume", new) == 0
    assert f"the run begins with the weights of {run / 'checkpoints/step-000009'} again" in capsys.readouterr().err
    assert contents(new / "checkpoints/step-000009")[Path("model.safetensors")] == made
    with pytest.raises(CheckpointError, match="the run began elsewhere"):
        verify_run(new, steps=20)


def test_a_run_that_goes_on_from_a_copied_checkpoint_keeps_its_metrics(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = run.parent / "saved"
    shutil.copytree(run / "checkpoints/step-000006", saved)
    for step in (6, 9):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    assert call("train", run / "config.yaml", "--resume", saved, "--output-dir", run) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == before

    branch = run.parent / "branch"
    branch.mkdir()
    (branch / "metrics.jsonl").write_text("another run's\n")
    monkeypatch.chdir(run / "checkpoints")
    assert call("train", run / "config.yaml", "--resume", "step-000003", "--output-dir", branch) == 0
    assert [json.loads(line)["step"] for line in (branch / "metrics.jsonl").read_text().splitlines()] == before
    assert (branch / "metrics.1.jsonl").read_text() == "another run's\n"
