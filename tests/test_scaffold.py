"""``ultrazoo new-plugin``: what it writes is a plugin that installs, passes its tests and trains, as it stands."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import plugin_parts
import pytest
import yaml

from ultrazoo.errors import ConfigError
from ultrazoo.ops import build
from ultrazoo.scaffold.render import LONGEST, names_of, render, taken_names, write

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"mixer and kernel": (True, True), "mixer": (True, False), "kernel": (False, True)}


def lay_out(folder: Path, name: str, *, mixer: bool, kernel: bool) -> Path:
    """Write a plugin into a folder for ``PYTHONPATH``, with the metadata that pip would make of its pyproject.toml."""
    names = names_of(name)
    files = render(names, mixer=mixer, kernel=kernel)
    write(folder, files)
    info = folder / f"{names.module}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {names.distribution}\nVersion: 0.1.0\n")
    found = re.search(r"\[project\.entry-points\.ultrazoo\]\n(.*\n)", files["pyproject.toml"])
    assert found is not None
    (info / "entry_points.txt").write_text(f"[ultrazoo]\n{found[1].replace(chr(34), '')}")
    return folder


def check(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """What ``ultrazoo check`` finds of a plugin: check -> result."""
    report = folder / "report.json"
    done = plugin_parts.zoo("check", name, "--quick", "--json", report, path=folder)
    assert done.returncode == 0, done.stderr
    return {f"{r['kind']} {r['check']}": r for r in json.loads(report.read_text())["results"]}


@pytest.mark.parametrize(
    ("given", "name", "distribution", "camel", "title"),
    [
        ("demo", "demo", "ultrazoo-demo", "Demo", "Demo"),
        ("ultrazoo-demo", "demo", "ultrazoo-demo", "Demo", "Demo"),
        ("Long.conv_2", "long_conv_2", "ultrazoo-long-conv-2", "LongConv2", "Long conv 2"),
        ("class", "class", "ultrazoo-class", "Class", "Class"),
    ],
)
def test_every_name_follows_from_one(given, name, distribution, camel, title):
    names = names_of(given)
    assert (names.name, names.distribution, names.camel, names.title) == (name, distribution, camel, title)
    assert names.module == f"ultrazoo_{name}" and names.folder == given


@pytest.mark.parametrize("given", ["", "-demo", "demo-", "a b", "2demo", "../demo", "démo", "ultrazoo-", "demo\n"])
def test_what_is_no_name_is_an_error(given):
    with pytest.raises(ConfigError, match="expected a letter, then letters and digits"):
        names_of(given)


def test_a_long_name_is_an_error():
    assert names_of("a" * LONGEST).name == "a" * LONGEST
    with pytest.raises(ConfigError, match=f"expected at most {LONGEST}"):
        names_of("a" * (LONGEST + 1))


@pytest.mark.parametrize("given", ["retnet", "Standard-attn", "gla", "core", "aten", "ultrazoo"])
def test_a_name_that_is_taken_is_an_error(given):
    with pytest.raises(ConfigError, match="is here already"):
        names_of(given, taken_names())


def test_a_plugin_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match="neither --mixer nor --kernel"):
        render(names_of("demo"), mixer=False, kernel=False)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_files_and_no_field_is_left(kind):
    mixer, kernel = KINDS[kind]
    files = render(names_of("my-mixer"), mixer=mixer, kernel=kernel)
    assert {"pyproject.toml", "README.md", "tests/test_my_mixer.py", "ultrazoo_my_mixer/py.typed"} <= set(files)
    assert ("ultrazoo_my_mixer/block.py" in files) == ("ultrazoo_my_mixer/my_mixer.yaml" in files) == mixer
    assert ("ultrazoo_my_mixer/op.py" in files) == ("ultrazoo_my_mixer/csrc/gated_mean/cpu.cpp" in files) == kernel
    for path, text in files.items():
        assert "$" not in text and "%%" not in text, path
        if path.endswith(".py"):
            ast.parse(text)
        elif path.endswith(".yaml"):
            assert yaml.safe_load(text)["model"]["layer_pattern"][0] == "my_mixer"


def test_the_distribution_is_told_whole():
    tomllib = pytest.importorskip("tomllib")
    files = render(names_of("my-mixer"), mixer=True, kernel=True)
    project = tomllib.loads(files["pyproject.toml"])
    assert project["project"]["name"] == "ultrazoo-my-mixer"
    assert project["project"]["entry-points"]["ultrazoo"] == {"my_mixer": "ultrazoo_my_mixer"}
    assert project["tool"]["setuptools"]["package-data"] == {"ultrazoo_my_mixer": ["py.typed", "*.yaml", "csrc/**/*"]}


def lint(tool: str, *arguments: str | Path, folder: Path) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    command = [sys.executable, "-m", tool, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["my-mixer", "m", "a" * LONGEST])
@pytest.mark.parametrize("kind", KINDS)
def test_ruff_has_nothing_to_say(kind, name, tmp_path):
    mixer, kernel = KINDS[kind]
    folder = tmp_path / "new"
    write(folder, render(names_of(name), mixer=mixer, kernel=kernel))
    lint("ruff", "check", "--no-cache", ".", folder=folder)
    lint("ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml", ".", folder=folder)
    if len(name) < LONGEST:  # where a formatter breaks lines depends on the length of the name
        lint("ruff", "format", "--no-cache", "--check", ".", folder=folder)


@pytest.mark.slow
def test_mypy_has_nothing_to_say(tmp_path):
    folder = tmp_path / "new"
    write(folder, render(names_of("my-mixer"), mixer=True, kernel=True))
    settings = (
        "--config-file",
        ROOT / "pyproject.toml",
        "--follow-imports",
        "silent",
        "--cache-dir",
        tmp_path / "mypy",
    )
    lint("mypy", *settings, "ultrazoo_my_mixer", folder=folder)


def test_the_command_writes_it_and_never_over_anything(tmp_path):
    done = plugin_parts.zoo("new-plugin", "my-mixer", "--mixer", "--output", tmp_path)
    assert done.returncode == 0 and "ultrazoo check my_mixer" in done.stderr
    readme = tmp_path / "my-mixer" / "README.md"
    assert "pip install -e" in readme.read_text()
    readme.write_text("mine")
    again = plugin_parts.zoo("new-plugin", "my-mixer", "--output", tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert readme.read_text() == "mine"


@pytest.mark.slow
def test_a_mixer_conforms_as_it_stands(tmp_path):
    results = check(lay_out(tmp_path / "new", "scaffold-mixer", mixer=True, kernel=False), "scaffold_mixer")
    assert {result["state"] for result in results.values()} <= {"passed", "measured"}
    assert {"mixer law: packing", "mixer law: gradients", "mixer training: loss falls", "preset preset: builds"} <= set(
        results
    )


@pytest.mark.slow
def test_a_kernel_is_at_par_as_it_stands(tmp_path):
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(error.reason)
    folder = lay_out(tmp_path / "new", "scaffold-both", mixer=True, kernel=True)
    results = check(folder, "scaffold_both")
    assert {result["state"] for result in results.values()} <= {"passed", "measured"}
    assert "compiled" in results["op parity: float32"]["what"]
    assert "mixer law: packing" in results


def test_its_own_tests_pass(tmp_path):
    folder = lay_out(tmp_path / "new", "scaffold-mixer", mixer=True, kernel=False)
    done = plugin_parts.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "tests", "-k", "mean or padding", path=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b2 passed", done.stdout)
