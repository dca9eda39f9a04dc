"""Run folders that hold files of the user, that were moved or copied, or that come from someone else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_parts import call, write_config

from ultrazoo.config.load import load_config
from ultrazoo.errors import CheckpointError
from ultrazoo.inference import find_checkpoint
from ultrazoo.train.durable import sha256
from ultrazoo.train.folder import RunFolder

Capture = pytest.CaptureFixture[str]
OFTEN = ["--set", "training.checkpoint_every_n_steps=2", "--set", "training.eval_every_n_steps=99"]
SHORT, LONGER = (["--set", f"training.max_steps={last}", *OFTEN] for last in (4, 6))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and a run of four steps, with checkpoints at 2 and 4, that is only copied."""
    folder = tmp_path_factory.mktemp("place")
    assert call("train", write_config(folder), "--output-dir", folder / "run", *SHORT) == 0
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(place / "run", tmp_path / "copy"))


def contents(folder: Path) -> dict[str, Any]:
    """Every file but the lock, with its bytes, and every link, with its target."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    links = {str(path): str(path.readlink()) for path in paths if path.is_symlink()}
    return links | {str(path): path.read_bytes() for path in paths if path.is_file() and not path.is_symlink()}


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-??????"))


# files that the run did not write


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_file_of_the_user_stops_the_run_before_it_writes(
    place: Path, tmp_path: Path, capsys: Capture, name: str, resume: list[str]
) -> None:
    (tmp_path / name).write_text("mine\n")
    assert call("train", place / "tiny.yaml", "--output-dir", tmp_path, *SHORT, *resume) == 2
    assert f"has {name} that no run wrote" in capsys.readouterr().err
    assert contents(tmp_path) == {str(tmp_path / name): b"mine\n"}


def test_the_tokenizer_in_use_may_be_in_the_run_folder(place: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(place / "run/tokenizer.json", tmp_path))
    before = own.stat()
    given = ["--set", f"training.tokenizer={own}"]
    assert call("train", place / "tiny.yaml", "--output-dir", tmp_path, *given, *SHORT) == 0
    after = own.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_edited_config_is_used_and_kept_aside_and_an_unchanged_one_is_not(run: Path, capsys: Capture) -> None:
    assert call("resume", run, *LONGER) == 0
    assert not list(run.glob("*.1.*")), "nothing was changed"
    edited = (run / "config.yaml").read_text().replace("max_steps: 6", "max_steps: 7  # one more")
    (run / "config.yaml").write_text(edited)
    assert call("resume", run) == 0
    assert "config.yaml: not as this run wrote it; kept as config.1.yaml" in capsys.readouterr().err
    assert (run / "config.1.yaml").read_text() == edited
    assert steps(run)[-1] == "step-000007"
    assert load_config(run / "config.yaml").config.training.max_steps == 7


def test_files_of_an_earlier_version_are_known_by_its_checkpoints(run: Path) -> None:
    record = json.loads((run / "env.json").read_text())
    for start in record["starts"]:
        del start["files"], start["run_dir"]
    (run / "env.json").write_text(json.dumps(record))
    assert call("resume", run, *LONGER) == 0
    assert not list(run.glob("*.1.*"))
    assert (
        sha256(run / "config.yaml") == json.loads((run / "env.json").read_text())["starts"][-1]["files"]["config.yaml"]
    )


def test_what_lies_among_checkpoints_and_flight_records_stays(run: Path, place: Path) -> None:
    root, flight = run / "checkpoints", run / "flight"
    (root / "best").write_text("my favorite is 2\n")
    foreign = Path(shutil.copytree(root / "step-000002", root / "step-000001"))
    state = json.loads((foreign / "state.json").read_text()) | {"run": "another"}
    (foreign / "state.json").write_text(json.dumps(state))
    (flight / "step-notes").mkdir(parents=True)
    (flight / "step-notes/mine.txt").write_text("mine")
    assert call("resume", run, *LONGER, "--set", "training.max_rolling_checkpoints=1") == 0
    assert steps(run) == ["step-000001", "step-000006"], "only its own are rotated"
    assert (root / "best.1").read_text() == "my favorite is 2\n"
    assert (flight / "step-notes/mine.txt").read_text() == "mine"


def test_a_lock_file_of_another_program_is_left_alone(place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / ".lock").write_text("[[package]]\n")
    assert call("train", place / "tiny.yaml", "--output-dir", tmp_path, *SHORT) == 2
    assert ".lock was not written by ultrazoo" in capsys.readouterr().err
    assert (tmp_path / ".lock").read_text() == "[[package]]\n"


def test_plot_replaces_only_what_it_drew(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (run / "training.png").write_bytes(b"mine")
    for _ in range(2):
        assert call("plot", run) == 0
    assert (run / "training.1.png").read_bytes() == b"mine" and not (run / "training.2.png").exists()
    photo, link = tmp_path / "photo.png", tmp_path / "link.png"
    photo.write_bytes(b"mine")
    link.symlink_to(photo)
    for output in (photo, link):
        assert call("plot", run, "-o", output) == 1
        assert "was not drawn by ultrazoo plot" in capsys.readouterr().err
    assert photo.read_bytes() == b"mine"


# moved and copied


@pytest.mark.parametrize("command", ["train", "resume", "checkpoint"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_copy_writes_into_itself(place: Path, run: Path, command: str, earlier: bool, capsys: Capture) -> None:
    before = contents(place / "run")
    if earlier:  # only the absolute output_dir has the former place
        record = json.loads((run / "env.json").read_text())
        del record["starts"][0]["run_dir"]
        (run / "env.json").write_text(json.dumps(record))
    called = {
        "train": ["train", run / "config.yaml", "--resume", "auto"],
        "resume": ["resume", run],
        "checkpoint": ["train", run / "checkpoints/step-000004/config.yaml", "--resume", "auto"],
    }[command]
    assert call(*called, *LONGER) == 0
    said = capsys.readouterr().err
    assert (f"belongs to the run in {run}, which is used" in said) == (command != "resume")
    assert "training.output_dir: checkpoint" not in said
    assert contents(place / "run") == before, "the original is as it was"
    assert steps(run)[-1] == "step-000006"
    assert load_config(run / "config.yaml").config.training.output_dir == str(run)
    assert str(place / "run") not in (run / "config.yaml").read_text()


def test_a_run_without_a_named_folder_resumes_where_its_config_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", place / "tiny.yaml", *SHORT) == 0
    assert call("train", "runs/tiny/config.yaml", "--resume", "auto", *LONGER) == 0
    assert steps(tmp_path / "runs/tiny")[-1] == "step-000006"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


@pytest.mark.parametrize("how", ["moved", "copied"])
@pytest.mark.parametrize("named", [True, False])
def test_paths_into_the_run_folder_follow_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, named: bool, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "runs/tiny", tmp_path / "elsewhere [2]"
    (first / "data").mkdir(parents=True)
    shutil.copy(place / "texts.parquet", first / "data")
    shutil.copy(place / "run/tokenizer.json", first / "own.json")
    inside = {
        "local_parquet_dir": first / "data/*.parquet",
        "tokenizer": first / "own.json",
        "cache_dir": first / "cache",
    }
    given = [word for name, path in inside.items() for word in ("--set", f'training.{name}="{path}"')]
    where = ["--output-dir", first] if named else []
    assert call("train", place / "tiny.yaml", *where, *given, *SHORT) == 0
    before = contents(first)
    (shutil.move if how == "moved" else shutil.copytree)(first, second)
    assert call("train", second / "config.yaml", "--resume", "auto", *LONGER) == 0
    said = capsys.readouterr().err
    assert "training.max_steps: checkpoint 4, this run 6" in said and "training.tokenizer: checkpoint" not in said
    kept = load_config(second / "config.yaml").config.training
    assert (kept.tokenizer, kept.cache_dir) == (str(second / "own.json"), str(second / "cache"))
    assert contents(first) == before if how == "copied" else not first.exists()
    assert call("resume", second, "--verify", "--steps", "3") == 0, "across the move"


def test_the_command_line_still_names_another_folder(place: Path, run: Path, tmp_path: Path) -> None:
    other, before = tmp_path / "other", contents(run)
    assert call("train", run / "config.yaml", "--resume", run, "--output-dir", other, *LONGER) == 0
    assert steps(other) == ["step-000006"] and contents(run) == before


def test_a_checkpoint_alone_has_no_run_folder(place: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(place / "run/checkpoints/step-000004", tmp_path / "alone"))
    assert load_config(alone / "config.yaml").config.training.output_dir is None
    template = Path(shutil.copy(place / "run/config.yaml", tmp_path / "config.yaml"))
    assert load_config(template).config.training.output_dir == str(place / "run"), "a config like any other"


# from someone else


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user with files and a checkpoint of another run, that nothing may touch."""
    folder = tmp_path / "outside"
    (folder / "step-000001").mkdir(parents=True)
    (folder / "step-000001/manifest.json").write_text("{}")
    (folder / "precious").write_text("precious")
    (folder / "empty").touch()
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.mark.parametrize("name", [".lock", "checkpoints"])
@pytest.mark.parametrize("target", ["precious", "missing", ""])
def test_a_link_in_the_place_of_lock_or_checkpoints_is_refused(
    run: Path, outside: Path, name: str, target: str, capsys: Capture
) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(outside / target)
    assert call("resume", run) == 2
    assert f"{path} is a symbolic link to {outside / target}, expected a f" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["precious", "empty", "missing", ""])
def test_links_in_the_place_of_other_files_are_moved_aside(
    run: Path, outside: Path, target: str, capsys: Capture
) -> None:
    root, names = run / "checkpoints", ["env.json", "tokenizer.json", "metrics.jsonl", "flight", "tensorboard"]
    places = [run / name for name in names] + [root / "latest", root / "best"]
    for path in places:
        path.unlink(missing_ok=True)
        path.symlink_to(outside / target)
    report = ["--set", 'training.report_to=["tensorboard"]']
    assert call("resume", run, *LONGER, *report) == 0
    said = capsys.readouterr().err
    assert said.count("got a symbolic link to") == 5 and said.count("was not written by this run") == 2
    assert not any(path.is_symlink() for path in places)
    assert steps(run)[-1] == "step-000006"
    links = [path for path in [*run.iterdir(), *root.iterdir()] if path.is_symlink()]
    assert len(links) == 7, "kept, under other names"


def test_linked_checkpoints_are_neither_rotated_nor_in_the_way(run: Path, outside: Path) -> None:
    root = run / "checkpoints"
    for name in ("step-000001", "step-000005", "step-999999", ".step-000003.deleting", ".latest.tmp-1"):
        (root / name).symlink_to(outside / "step-000001")
    (root / "step-000006").symlink_to(outside / "missing")
    (run / ".config.yaml.tmp-1").symlink_to(outside)
    for last in (6, 7):
        keep = ["--set", "training.max_rolling_checkpoints=1", "--set", f"training.max_steps={last}"]
        assert call("resume", run, *keep) == 0
    assert (root / "step-000007/manifest.json").is_file() and not (root / "step-000007").is_symlink()
    assert (root / "step-000006.link").is_symlink()
    assert not os.path.lexists(root / ".step-000003.deleting")


@pytest.mark.parametrize(
    "pointer", ["../../outside/step-000001", "/etc", "..", "step-1/../..", "step-000001\n\nx", "\x00"]
)
def test_pointers_stay_inside(run: Path, outside: Path, pointer: str) -> None:
    (run / "checkpoints/best").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"best: got .*, which does not name a checkpoint inside"):
        find_checkpoint(run)
    (run / "checkpoints/best").write_text("step-000009")
    (run / "checkpoints/step-000009").symlink_to(outside / "step-000001")
    with pytest.raises(CheckpointError, match="does not name a checkpoint inside"):
        find_checkpoint(run)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_named_pipes_are_not_waited_for(run: Path, place: Path, tmp_path: Path, capsys: Capture) -> None:
    last = run / "checkpoints/step-000004"
    for path in (last / "manifest.json", run / "metrics.jsonl", run / "env.json", run / "checkpoints/latest"):
        path.unlink()
        os.mkfifo(path)
    for command in ("inspect", "plot"):
        assert call(command, run) == 1
        assert "is a named pipe, expected a file" in capsys.readouterr().err
    assert call("resume", run, *LONGER) == 0
    said = capsys.readouterr().err
    assert "metrics.jsonl: got a named pipe, expected a file; moved aside as metrics.1.jsonl" in said
    assert "step-000004.damaged" in said
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    assert call("resume", run) == 2
    assert ".lock is a named pipe, expected a file" in capsys.readouterr().err


def test_the_run_folder_itself_may_be_a_link(place: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "disk/run", tmp_path / "run"
    real.mkdir(parents=True)
    link.symlink_to(real)
    assert call("train", place / "tiny.yaml", "--output-dir", link, *SHORT) == 0
    assert call("train", link / "config.yaml", "--resume", "auto", *LONGER) == 0
    assert steps(real)[-1] == "step-000006" and find_checkpoint(link).parent == link / "checkpoints"
    assert RunFolder(real).starts()[-1]["run_dir"] == str(link)
