"""What the documents show exists: every command parses, every target and file is there, the plugin works."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from ultrazoo import hookspecs
from ultrazoo.cli import app
from ultrazoo.config import load_config
from ultrazoo.model import build_model
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.laws import run_laws

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/plugins.md", "docs/kernels.md")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[str]:
    """The lines of the documents that call a program, without comments."""
    lines = [line for document in DOCUMENTS for block in blocks(document, "sh") for line in block.splitlines()]
    lines = [line for line in lines if " demo" not in line]  # the tutorial's plugin: test_tutorial.py runs those
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(line) for line in words if line and line[0] in (program, f".venv/bin/{program}")]


def test_there_are_commands_to_check() -> None:
    assert len(commands("ultrazoo")) > 8 and len(commands("make")) > 3


@pytest.mark.parametrize("command", commands("ultrazoo"))
def test_every_command_parses_and_names_what_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser: Any = typer.main.get_command(app)
    rest = shlex.split(command)[1:]
    while hasattr(parser, "commands"):
        first = "run" if parser.name == "bench" and rest[0] not in parser.commands else rest.pop(0)
        parser = parser.commands[first]
    options = parser.make_context(parser.name, rest).params
    if "config" in options:
        load_config(options["config"], options["overrides"] or [])
    if parser.name == "parity":
        assert options["subject"] in {"all", *registry().mixers(), *(name.split("::")[1] for name in registry().ops())}
    if "block" in options:
        registry().find_block(options["block"])


@pytest.mark.parametrize("command", commands("make"))
def test_every_make_target_exists(command: str) -> None:
    done = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document: str) -> None:
    text = (ROOT / document).read_text()
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing


def test_the_tables_name_every_block_and_preset() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    zoo = registry()
    assert rows == {name for kind in ("mixer", "ffn", "norm") for name in zoo.blocks(kind)} | set(zoo.presets())


def test_the_table_of_presets_counts_right() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    for name, count in rows:
        with torch.device("meta"):
            model = build_model(load_config(name).config.model)
        assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" == count, name


def test_the_tables_papers_are_those_of_the_blocks() -> None:
    papers = dict(
        re.findall(r"^\| `(\w+)` \| [\w-]+ \|.*\| (\d{4}\.\d{5}) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    zoo = registry()
    assert {name for kind in ("mixer", "ffn", "norm") for name in zoo.blocks(kind)} == set(papers)
    assert all(paper in zoo.find_block(name).paper for name, paper in papers.items())


def test_the_hooks_are_documented_with_their_signatures() -> None:
    text = (ROOT / "docs/plugins.md").read_text()
    hooks = [hook for name, hook in vars(hookspecs).items() if name.startswith("ultrazoo_")]
    assert len(hooks) == 3
    for hook in hooks:
        assert f"def {hook.__name__}{inspect.signature(hook)}: ...".replace("'", "") in text


@pytest.fixture
def documented_plugin() -> BlockSpec:
    """The block of the plugin that docs/plugins.md shows."""
    source = next(block for block in blocks("docs/plugins.md", "python") if "hookimpl" in block)
    module: dict[str, Any] = {"__name__": "ultrazoo_average"}
    exec(source, module)
    (spec,) = module["ultrazoo_blocks"]()
    return spec


def test_the_plugin_of_the_documents_computes_what_it_says(documented_plugin: BlockSpec) -> None:
    mixer = documented_plugin.module(documented_plugin.config(hidden_size=8, scale=0.5)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    y = mixer(x, torch.tensor([[1, 1, 2, 2, 0]]))
    torch.testing.assert_close(y[0, 2], 0.5 * mixer.out(x[0, 2:4].mean(0)))


def test_the_plugin_of_the_documents_keeps_the_laws(documented_plugin: BlockSpec) -> None:
    assert [str(result) for result in run_laws(documented_plugin) if not result.passed] == []
