"""Whole runs: a real model on real text, their folders, and what ends them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from ultrazoo.config import Config, config_from_dict, load_config
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.train import train
from ultrazoo.train.checkpoint import verify_checkpoint
from ultrazoo.train.durable import sha256
from ultrazoo.train.folder import RunFolder
from ultrazoo.train.inspection import RunReport, inspect_path
from ultrazoo.train.team import Team

TIMED = {"seconds", "tokens_per_second", "data_wait_share", "memory_bytes"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of sentences that can be learnt, and beside it the cache of its tokens."""
    folder = tmp_path_factory.mktemp("text")
    subjects, verbs = ["the king", "a queen", "one bird", "the old sea"], ["sees", "follows", "remembers", "hears"]
    rows = [f"{subjects[i % 4]} {verbs[i // 4 % 4]} {subjects[i // 16 % 4]} {'again ' * (i % 5)}." for i in range(400)]
    pq.write_table(pa.table({"text": rows}), folder / "rows.parquet")
    return folder


def make_config(text: Path, model: dict[str, Any] | None = None, **training: Any) -> Config:
    shape = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 32}
    small = {"local_parquet_dir": str(text / "rows.parquet"), "cache_dir": str(text / "cache"), "batch_size": 4}
    small |= {"max_length": 32, "max_steps": 8, "learning_rate": 1e-2, "device": "cpu", "num_threads": 1}
    small |= {"log_every_n_steps": 2, "eval_every_n_steps": 4, "eval_max_batches": 2, "checkpoint_every_n_steps": 4}
    return config_from_dict({"model": shape | (model or {}), "training": small | training}, "test")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def test_a_run_leaves_its_folder_and_returns_its_table(text: Path, tmp_path: Path) -> None:
    run, console = tmp_path / "run", quiet()
    result = train(make_config(text, report_to=["tensorboard"]), run_dir=run, console=console)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "env.json", "metrics.jsonl", "tokenizer.json", "checkpoints", "tensorboard", ".lock",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000004", "step-000008", "latest", "best"}
    last = run / "checkpoints" / "step-000008"
    verify_checkpoint(last)
    assert json.loads((last / "state.json").read_text())["tokenizer_sha256"] == sha256(last / "tokenizer.json")
    assert (run / "tokenizer.json").read_bytes() == (last / "tokenizer.json").read_bytes()
    assert (run / "config.yaml").read_text() == make_config(text, report_to=["tensorboard"]).to_yaml()
    start = json.loads((run / "env.json").read_text())["starts"][0]
    assert (start["torch"], start["num_threads"], start["resumed_from"]) == (torch.__version__, 1, None)
    assert [record["step"] for record in records(run)] == [2, 4, 4, 6, 8, 8]
    assert list((run / "tensorboard").glob("events.*"))
    assert result["steps"] == 8
    assert result["validation_loss"] < 5.7  # ln 300
    assert 0 < result["unigram_entropy"] < 5.7
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("step 2/8 loss", "tok/s", "validation loss", "unigram entropy", "waiting for data", "adamw:"):
        assert words in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "dataloader_workers": 1}])
def test_a_killed_run_resumes_to_the_bit_on_real_data(text: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = make_config(text, max_steps=10, checkpoint_every_n_steps=3, **settings)
    train(config, run_dir=tmp_path / "straight", console=quiet())
    code = (
        "import sys, os, signal; from pathlib import Path; from ultrazoo.config import config_from_dict\n"
        "from ultrazoo.config.yaml import parse_yaml; from ultrazoo.train import train, loop\n"
        "take = loop.Trainer.step\n"
        "def step(self):\n"
        "    if self.progress.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    take(self)\n"
        "loop.Trainer.step = step\n"
        "train(config_from_dict(parse_yaml(sys.stdin.read(), 'x'), 'x'), run_dir=Path(sys.argv[1]))\n"
    )
    broken = tmp_path / "broken"
    done = subprocess.run(
        [sys.executable, "-c", code, str(broken)], input=config.to_yaml(), text=True, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert records(broken)[-1]["step"] == 4
    train(config, run_dir=broken, resume="auto", console=quiet())
    assert records(broken) == records(tmp_path / "straight")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ends = [folder / "checkpoints" / "step-000010" / file for folder in (tmp_path / "straight", broken)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), file
    assert [start["step"] for start in json.loads((broken / "env.json").read_text())["starts"]] == [0, 4]


def test_what_a_resume_refuses_leaves_the_folder_as_it_was(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_config(text), run_dir=run, console=quiet())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        train(make_config(text), run_dir=run, console=quiet())
    with pytest.raises(CheckpointError, match=r"model\.hidden_size: checkpoint 16, this run 32"):
        train(make_config(text, {"hidden_size": 32}), run_dir=run, resume="auto", console=quiet())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("inside", ["checkpoints/step-000004", "flight/step-000002"])
def test_a_checkpoint_or_flight_record_is_no_run_folder(text: Path, tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "run" / inside
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a checkpoint or a flight record, expected a run folder"):
        train(make_config(text), run_dir=folder, resume="auto", console=quiet())
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_packages_are_asked_for_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config(tmp_path / "no such text", use_galore=True)
    with pytest.raises(ConfigError, match="galore-torch is not installed"):
        train(config, run_dir=tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


class _Two(Team):
    """Does the work of two processes that come one after the other."""

    def in_turn(self, work):  # type: ignore[no-untyped-def]
        work()
        return work()


def test_of_many_processes_one_makes_the_cache_anew(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrazoo.train.run.joined", lambda training: nullcontext((_Two(), training)))
    config, console = (
        make_config(text, max_steps=1, cache_dir=str(tmp_path / "cache"), prefer_local_cache=False),
        quiet(),
    )
    for name in ("first", "second"):
        train(config, run_dir=tmp_path / name, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (said.count("tokenised 400 rows"), said.count("rebuilt as asked")) == (2, 1)


def test_relative_paths_mean_what_they_meant_where_the_run_began(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, elsewhere = tmp_path / "run[1]", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (work / "data").mkdir(parents=True)
    shutil.copy(text / "rows.parquet", work / "data")
    train(make_config(text, max_steps=1), run_dir=tmp_path / "first", console=quiet())
    shutil.copy(tmp_path / "first/tokenizer.json", work)
    relative = {"cache_dir": "cache", "tokenizer": "tokenizer.json", "output_dir": "out"}
    for number, location in enumerate(("data", "./data/", "data/*.parquet", "data/rows.parquet")):
        monkeypatch.chdir(work)
        run, console = Path(f"out{number}"), quiet()
        config = make_config(text, local_parquet_dir=location, max_steps=4, **relative)
        train(config, run_dir=run, console=console)
        kept = load_config(run / "config.yaml").config
        assert kept == load_config(run / "checkpoints/step-000004/config.yaml").config
        assert kept.training.cache_dir == str(work / "cache") and kept.training.output_dir == str(work / run)
        assert train(config, run_dir=run, resume="auto", console=console)["steps"] == 4, "from the same folder"
        monkeypatch.chdir(elsewhere)
        longer = load_config(work / run / "config.yaml", ["training.max_steps=8"]).config
        assert train(longer, run_dir=work / run, resume="auto", console=console)["steps"] == 8
        changes = [line for line in console.file.getvalue().splitlines() if "changed since" in line]  # type: ignore[attr-defined]
        assert len(changes) == 1 and "training.max_steps: checkpoint 4, this run 8" in changes[0]
    assert not list(elsewhere.iterdir())


def test_relative_paths_in_the_checkpoints_of_earlier_versions_are_no_change(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text)
    (text / "other").mkdir()
    shutil.copy(text / "rows.parquet", text / "other")
    paths = {"local_parquet_dir": "rows.parquet", "cache_dir": "./cache"}
    with monkeypatch.context() as earlier:
        earlier.setattr("ultrazoo.train.run.anchored", lambda training: training)
        train(make_config(text, **paths, max_steps=4), run_dir=tmp_path, console=quiet())
    assert "local_parquet_dir: rows.parquet" in (tmp_path / "config.yaml").read_text()
    for change, told in (({}, 0), ({"local_parquet_dir": "other/rows.parquet"}, 1)):
        console = quiet()
        train(make_config(text, **paths | change, max_steps=4), run_dir=tmp_path, resume="auto", console=console)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert said.count("changed since") == said.count("training.local_parquet_dir: checkpoint") == told


def test_a_run_branches_into_another_folder_with_its_metrics(text: Path, tmp_path: Path) -> None:
    train(make_config(text), run_dir=tmp_path / "first", console=quiet())
    start = tmp_path / "first" / "checkpoints" / "step-000004"
    train(make_config(text, max_steps=6), run_dir=tmp_path / "second", resume=str(start), console=quiet())
    assert [record["step"] for record in records(tmp_path / "second")] == [2, 4, 4, 6, 6]
    assert records(tmp_path / "second")[:3] == records(tmp_path / "first")[:3]


def test_metrics_of_a_run_without_checkpoints_are_kept_aside(text: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    train(make_config(text, max_steps=1), run_dir=tmp_path, resume="auto", console=quiet())
    assert (tmp_path / "metrics.1.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("damaged", [b"{", b"[1]", b"\xff", b'{"starts": [{}]}', b'{"starts": 3}'])
def test_a_damaged_env_json_is_set_aside_and_the_run_goes_on(text: Path, tmp_path: Path, damaged: bytes) -> None:
    train(make_config(text, max_steps=1), run_dir=tmp_path, console=quiet())
    (tmp_path / "env.json").write_bytes(damaged)
    report, console = inspect_path(tmp_path), quiet()
    assert isinstance(report, RunReport) and report.starts == []
    train(make_config(text, max_steps=2), run_dir=tmp_path, resume="auto", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "env.json: damaged: " in said and "set aside as env.1.json" in said
    assert (tmp_path / "env.1.json").read_bytes() == damaged
    assert [start["step"] for start in json.loads((tmp_path / "env.json").read_text())["starts"]] == [1]


def test_a_second_trainer_in_the_folder_is_refused_and_no_lock_outlives_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ultrazoo.train.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"in use by another trainer .process {other.pid}"), RunFolder(tmp_path):
            pass
        other.kill()
        other.wait()
    with RunFolder(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_run_folder_that_is_a_file_fails_before_anything_else(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("here")
    with pytest.raises(ConfigError, match="cannot be used as a run folder"):
        train(make_config(text), run_dir=tmp_path / "run", console=quiet())


def test_process_settings_are_put_back(text: Path, tmp_path: Path) -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGINT))
    train(make_config(text, max_steps=1, num_threads=2), run_dir=tmp_path / "run", console=quiet())
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGINT))
    assert after == before
