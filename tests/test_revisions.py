"""A run keeps the revisions of the rules that it began with; what cannot be followed is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_parts import call, write_config
from test_verify import change_state

from ultrazoo.config import Config
from ultrazoo.errors import CheckpointError
from ultrazoo.revisions import RULES, Rule, current_revisions, saved_revisions
from ultrazoo.train.verify import verify_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("revisions")
    sets = ("--set", "training.max_steps=4", "--set", "training.checkpoint_every_n_steps=2")
    assert call("train", write_config(folder), "--output-dir", folder / "run", *sets) == 0
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def revisions_of(checkpoint: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((checkpoint / "state.json").read_text())["revisions"]
    return found


def add_rule(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    patch.setitem(RULES, "order", Rule(**{"meanings": ("rows by name", "rows by hash"), **changes}))


def test_a_new_run_records_the_current_revisions(run: Path, capsys: Capture) -> None:
    for checkpoint in (run / "checkpoints").glob("step-*"):
        assert revisions_of(checkpoint) == current_revisions()
    assert call("inspect", run / "checkpoints/step-000004", "--json") == 0
    assert json.loads(capsys.readouterr().out)["revisions"] == current_revisions()


def test_a_run_from_before_a_rule_changed_keeps_the_old_one(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rule(monkeypatch)
    assert call("inspect", run / "checkpoints/step-000004") == 0
    assert "order 1" in capsys.readouterr().out
    assert call("resume", run, "--set", "training.max_steps=6") == 0
    line = "resume: rule order stays at revision 1 (rows by name); new runs use 2 (rows by hash)"
    assert line in capsys.readouterr().err
    assert revisions_of(run / "checkpoints/step-000006")["order"] == 1
    found = verify_run(run)
    assert found is not None and found.first_difference is None


def test_a_rule_that_makes_no_difference_is_current(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rule(monkeypatch, oldest=2, matters=lambda config: config["training"]["whole_word_masking"])
    assert call("resume", run, "--set", "training.max_steps=6") == 0
    assert "rule order" not in capsys.readouterr().err
    assert revisions_of(run / "checkpoints/step-000006")["order"] == 2


def test_an_old_rule_that_is_gone_refuses_the_run_and_its_weights_begin_a_new_one(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rule(monkeypatch, oldest=2)
    assert call("resume", run, "--set", "training.max_steps=6") == 1
    assert "rule order: got revision 1 (rows by name), expected 2 (rows by hash)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="rule order: got revision 1"):
        verify_run(run)
    new = tmp_path / "new"
    start = ("--resume", run, "--weights-only", "--output-dir", new, "--set", "training.max_steps=1")
    assert call("train", run / "config.yaml", *start) == 0
    assert revisions_of(new / "checkpoints/step-000001")["order"] == 2


@pytest.mark.parametrize("saved", [{"order": 3}, {"of a later version": 1}])
def test_a_rule_of_a_later_version_is_refused(
    run: Path, saved: dict[str, int], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rule(monkeypatch)
    change_state(run / "checkpoints/step-000004", revisions=saved)
    assert call("resume", run, "--set", "training.max_steps=6") == 1
    [(name, revision)] = saved.items()
    assert f"rule {name}: got revision {revision}, which is not known here" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_never_reinterpreted(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation at ``mlm_probability`` and unigram statistics over all rows, as before there were revisions."""
    sets = ("--set", "training.mlm_probability=0.4", "--set", "training.max_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr("ultrazoo.train.run.current_revisions", lambda: dict.fromkeys(RULES, 1))
        assert call("train", write_config(tmp_path), "--output-dir", tmp_path / "run", *sets) == 0
    checkpoint = tmp_path / "run/checkpoints/step-000003"
    change_state(checkpoint, revisions=None)
    found = verify_run(tmp_path / "run")
    assert found is not None and (found.first_difference, found.start) == (None, None)
    assert found.compared["records"] > 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert call("resume", tmp_path / "copy", "--set", "training.max_steps=4") == 0
    said = capsys.readouterr().err
    assert "rule validation_masks stays at revision 1 (validation masks at training.mlm_probability)" in said
    assert "rule unigram_counts stays at revision 1" in said
    change_state(checkpoint, revisions=current_revisions())
    found = verify_run(tmp_path / "run")
    assert found is not None and found.differ["weights"] and found.differ["records"]


def test_every_problem_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    add_rule(monkeypatch, oldest=2)
    with pytest.raises(CheckpointError, match=r"(?s)here: made under.*rule a: .*rule b: .*rule order: "):
        saved_revisions("here", {"b": 2, "a": 1}, Config().to_dict())
