"""A run names the plugins that it needs, and says which to install where they are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_parts import call, train_tiny, write_config
from plugin_parts import Entry, block, install, load, module_with, zoo

from ultrazoo.config import Config, config_from_dict, load_config, needs
from ultrazoo.config import load as loading
from ultrazoo.errors import ConfigError
from ultrazoo.registry import Registry
from ultrazoo.train.inspection import inspect_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose second layer is of the plugin ``toy`` 0.3, and beside it the plugin."""
    folder = tmp_path_factory.mktemp("trained")
    site, config = install(folder / "site"), write_config(folder)
    pattern = "model.layer_pattern=[standard_attn, {block: toy, order: 3}]"
    done = zoo("train", config, "--output-dir", folder / "run", "--set", pattern, path=site)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_config_and_the_receipt_name_distribution_version_and_blocks(trained: Path) -> None:
    (checkpoint,) = sorted((trained / "run" / "checkpoints").glob("step-*"))[-1:]
    text = (checkpoint / "config.yaml").read_text()
    assert "plugins:\n  ultrazoo-toy: '0.3'\n" in text and "block: toy\n    order: 3" in text
    plugins = json.loads((checkpoint / "receipt.json").read_text())["plugins"]
    assert plugins[0]["distribution"] == "ultrazoo" and "standard_attn" in plugins[0]["blocks"]
    assert plugins[1:] == [{"distribution": "ultrazoo-toy", "version": "0.3", "blocks": ["toy"]}]


@pytest.mark.parametrize("command", ["resume RUN", "train RUN/config.yaml --resume auto", "fill-mask RUN [MASK]"])
def test_without_the_plugin_every_use_says_what_to_install(
    command: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*(word.replace("RUN", str(trained / "run")) for word in command.split())) == 2
    error = capsys.readouterr().err
    assert "plugins.ultrazoo-toy: version 0.3 is needed and none is installed; ultrazoo does not know" in error
    assert "pip install" not in error
    assert "model.layer_pattern[1]: unknown name 'toy'" in error


def test_inspect_needs_no_plugin_and_says_which_is_missing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", trained / "run") == 0
    error = capsys.readouterr().err
    assert "warning: ultrazoo-toy: version 0.3 is needed and none is installed; ultrazoo does not know" in error
    assert "pip install" not in error
    (checkpoint,) = sorted((trained / "run" / "checkpoints").glob("step-*"))[-1:]
    assert call("inspect", checkpoint) == 0
    assert "ultrazoo-toy 0.3 (toy)" in capsys.readouterr().out


def test_with_another_version_it_goes_on_with_a_warning(trained: Path, tmp_path: Path) -> None:
    site = install(tmp_path / "site", version="0.4")
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    done = zoo("resume", run, "--set", "training.max_steps=7", path=site)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plugins.ultrazoo-toy: written with version 0.3, version 0.4 is installed") == 1
    assert "plugins.ultrazoo-toy: checkpoint '0.3', this run '0.4'" in done.stderr
    assert "ultrazoo-toy: '0.4'" in (run / "config.yaml").read_text()


def test_what_is_disabled_or_broken_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Entry("off", "zoo-off", module_with(ultrazoo_blocks=lambda: [block("off")]))
    found = load(monkeypatch, off, Entry("bad", "zoo-bad", ImportError("no torch")), disable="off")
    zoo = Registry(list(found.values()))
    monkeypatch.setattr(needs, "registry", lambda: zoo)
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"plugins": {"zoo-off": "1", "zoo-bad": "1.2"}}, "here")
    assert "plugins.zoo-off: zoo-off 1.2 (plugin 'off') is disabled by ULTRAZOO_DISABLE_PLUGINS=off" in str(
        caught.value
    )
    assert "plugins.zoo-bad: zoo-bad 1.2 (plugin 'bad') did not load: ImportError: no torch" in str(caught.value)


def test_only_published_plugins_are_recommended() -> None:
    assert needs.missing({"ultrazoo-gla": "1"})["ultrazoo-gla"].endswith("pip install ultrazoo-gla")
    assert "pip install" not in needs.missing({"ultrazoo-gIa": "1"})["ultrazoo-gIa"]


def test_a_config_of_built_in_blocks_needs_nothing(tmp_path: Path) -> None:
    assert Config().plugins == {} and loading.config_from_dict({"model": {}}, "an older config") == Config()
    path = tmp_path / "c.yaml"
    path.write_text("plugins: [ultrazoo-gla]\n")
    with pytest.raises(ConfigError, match="plugins: got"):
        load_config(path)


def test_checkpoints_from_before_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny(tmp_path)
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    config, receipt = checkpoint / "config.yaml", checkpoint / "receipt.json"
    config.write_text(config.read_text().replace("plugins: {}\n", ""))
    receipt.write_text(json.dumps({**json.loads(receipt.read_text()), "plugins": {"ultrazoo": "0.0.1"}}))
    manifest = checkpoint / "manifest.json"
    from ultrazoo.train.durable import sha256

    entries = json.loads(manifest.read_text())
    for path in (config, receipt):
        entries["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest.write_text(json.dumps(entries))
    report = inspect_checkpoint(checkpoint)
    assert report.plugins == [{"distribution": "ultrazoo", "version": "0.0.1", "blocks": []}]
    assert report.problem is None and report.missing_plugins == []
    capsys.readouterr()
    assert call("fill-mask", run, "the [MASK] of the sea") == 0
