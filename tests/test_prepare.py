"""Kernels are loaded or built before anything is timed, visibly, and a build that is interrupted leaves no trace."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_parts import call, train_tiny, write_config

from ultrazoo.blocks.retnet import SPEC as RETNET
from ultrazoo.errors import UltrazooError
from ultrazoo.ops import build, library, loader, policy, prepare, prepare_blocks, progress
from ultrazoo.train import run as training
from ultrazoo.train.team import Team

SLOW = 2.0
BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ultrazoo.ops import build
build.AT_INSTALL = Path("missing.so")
build.library()
"""
COMPILER = """#!/bin/sh
echo $$ >> {folder}/compilers
sleep 60
"""


@pytest.fixture
def slow_build(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is loaded yet, and a build takes two seconds and fails; returns the log level of each."""
    levels: list[int] = []

    def slow(*, report: Callable[[int, int], None], **_: Any) -> Path:
        levels.append(logging.getLogger("ultrazoo").getEffectiveLevel())
        report(1, 3)
        time.sleep(SLOW)
        raise build.BuildError("planted", "none needed")

    monkeypatch.setattr(build, "library", slow)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(policy, "current", "auto")
    monkeypatch.setattr(library, "_announced", set())
    return levels


def first_record(run: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record for record in records if "tokens_per_second" in record)


def test_the_clock_of_a_run_starts_after_the_build(
    slow_build: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[int] = []
    whole = training.Trainer.run
    monkeypatch.setattr(training.Trainer, "run", lambda *given: built.append(len(slow_build)) or whole(*given))
    limits = ("--set", "training.max_steps=null", "--set", f"training.max_minutes={SLOW / 2 / 60}")
    assert call("train", write_config(tmp_path), "--output-dir", tmp_path / "run", *limits) == 0
    assert built == [1] and len(slow_build) == 1
    assert "kernels: compiled 1 of 3 files" in capsys.readouterr().err


def test_rank_0_builds_while_the_others_wait_without_a_timeout(
    slow_build: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(Team):
        patient = 0

        def in_turn(self, work: Callable[[], Any]) -> Any:
            before = len(slow_build)
            done = work()
            self.patient += len(slow_build) - before
            return done

    team = Watched()

    @contextmanager
    def joined(config: Any) -> Iterator[tuple[Team, Any]]:
        yield team, config

    monkeypatch.setattr(training, "joined", joined)
    train_tiny(tmp_path)
    assert len(slow_build) == team.patient == 1


@pytest.mark.parametrize("command", [("bench", "rk4_stage", "--seconds", "0"), ("check", "ultrazoo::rk4_stage")])
def test_commands_that_measure_build_first_and_say_so(
    slow_build: list[int], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrazoo.bench.machine.describe", lambda *_: pytest.fail("the machine is looked at before"))
    monkeypatch.setattr("ultrazoo.testing.conformance_result.Task.run", lambda self: pytest.fail("checked before"))
    monkeypatch.setattr(build, "library", lambda **_: slow_build.append(library_level()) or stop())
    assert call(*command) == 1
    assert slow_build == [logging.INFO]


def library_level() -> int:
    return logging.getLogger("ultrazoo").getEffectiveLevel()


def stop() -> Path:
    raise UltrazooError("a planted end")


@pytest.mark.usefixtures("slow_build")
def test_the_first_step_of_a_compiled_model_is_not_time_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []
    whole = training.Trainer.step

    def step(self: Any) -> None:
        whole(self)
        time.sleep(0.0 if steps else SLOW)  # torch.compile at work
        steps.append(self.progress.elapsed_seconds)

    monkeypatch.setattr(training.Trainer, "step", step)
    monkeypatch.setattr("ultrazoo.train.loop.compile_layers", lambda *_: None)
    settings = ("training.compile=true", "training.max_steps=null", f"training.max_minutes={SLOW / 2 / 60}")
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert call("train", write_config(tmp_path), "--output-dir", tmp_path / "run", *arguments) == 0
    assert len(steps) > 1 and first_record(tmp_path / "run")["seconds"] < SLOW / 2


def test_a_model_gets_the_libraries_of_its_blocks_and_of_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(loader, "load", loaded.append)
    made = {
        "named": "elsewhere.ops",
        "undeclared": "a_plugin.ops",
        "stray": "another_plugin",
        "ultrazoo": "ultrazoo.ops",
    }
    libraries = {name: SimpleNamespace(namespace=name, owner=owner) for name, owner in made.items()}
    monkeypatch.setattr(library, "_libraries", libraries)
    monkeypatch.setattr(library, "_ops", {"named::op": SimpleNamespace(namespace="named")})

    class Config:
        __module__ = "a_plugin.block"

    block: Any = SimpleNamespace(config=Config, ops=("named::op", "unknown::op"))
    prepare_blocks([block])
    assert loaded == ["named", "ultrazoo", "undeclared"]
    loaded.clear()
    prepare(["named::op"])
    assert loaded == ["named"]
    monkeypatch.setattr(policy, "current", "reference")
    loaded.clear()
    prepare_blocks([block, RETNET])
    assert loaded == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_build_at_once_with_its_exit_code(tmp_path: Path, name: str) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "MAX_JOBS": "2"}
    command = [sys.executable, "-c", BUILD, str(Path(__file__).parents[1])]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    number = signal.Signals[name]
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "compilers").exists() or len((tmp_path / "compilers").read_text().split()) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    expected = -signal.SIGINT if name == "SIGINT" else 128 + number  # Python's own end by KeyboardInterrupt
    assert process.returncode == expected, said
    assert f"{name}: the build of the kernels ends" in said
    for pid in map(int, (tmp_path / "compilers").read_text().split()):
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    assert sorted(path.name for path in (tmp_path / "ultrazoo/kernels").iterdir()) == ["lock", "objects"]


def test_doctor_builds_nothing_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Path] = []

    def fake(cached: Path, *_: Any) -> None:
        built.append(cached)
        raise build.BuildError("planted", "none needed")

    monkeypatch.setattr(build, "_build_into", fake)
    monkeypatch.setattr(build, "find_compiler", lambda: "c++")
    monkeypatch.setattr(build, "AT_INSTALL", tmp_path / "missing.so")
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert call("doctor", "--json") == 0 and not built
    (found,) = json.loads(capsys.readouterr().out)["libraries"]
    assert found["detail"].startswith("not compiled yet (") and "none was compiled at install" in found["detail"]
    assert "doctor --build" in found["fix"] and str(tmp_path / "ultrazoo/kernels") in found["fix"]
    assert call("show", "retnet") == 0 and not built and not loader._loaded
    assert call("doctor", "--build", "--json") == 0 and len(built) == 1
    (found,) = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))["libraries"]
    assert found["detail"] == "planted"
