"""Configs and JSON files that are made to hurt: each is one short error, at little cost."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_parts import call, train_tiny

from ultrazoo.bench.records import read_rows
from ultrazoo.config import load_config
from ultrazoo.config.yaml import dump_yaml, parse_yaml
from ultrazoo.errors import ConfigError, DataError
from ultrazoo.plot import read_metrics

Capture = pytest.CaptureFixture[str]
LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
BOMBS = {
    "flow nesting": ("model: " + "[" * 100_000, "more than 32 levels of nesting"),
    "closed nesting": ("model: " + "[" * 1000 + "]" * 1000, "more than 32 levels of nesting"),
    "block nesting": ("".join(" " * n + "a:\n" for n in range(600)), "more than 32 levels of nesting"),
    "aliases": (LAUGHS, "more than 5,000 values"),
    "nested aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 64)),
        "more than 32 levels",
    ),
    "recursive alias": ("model: &m {block_options: *m}", "an alias refers to a value that holds it"),
    "many keys": ("".join(f"key{n}: 1\n" for n in range(100_000)), "got more than 262,144 bytes"),
    "keys": ("".join(f"k{n}: 1\n" for n in range(2_600)), "more than 5,000 values"),
    "unknown keys": ("".join(f"k{n}: 1\n" for n in range(2_400)), "2,380 more problems"),
    "unknown blocks": (f"model: {{layer_pattern: [{'x, ' * 4_000}y]}}", "unknown name 'x'"),
    "unknown options": (f"model: {{block_options: {{{', '.join(f'k{n}: {{}}' for n in range(2_000))}}}}}", "'k0'"),
    "digits": ("training: {seed: " + "9" * 5_000 + "}", "a number of 5,000 characters"),
    "hexadecimal": ("training: {seed: 0x" + "f" * 5_000 + "}", "a number of 5,002 characters"),
    "fraction": ("training: {learning_rate: " + "9" * 5_000 + ".0}", "got inf"),
    "long text": ("model_class: " + "x" * 200_000, "(200,002 characters)"),
    "long key": ("x" * 1_000 + ": 1", "unknown field"),
}


def damaged(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_config_is_one_short_error(bomb: str, tmp_path: Path) -> None:
    text, expected = BOMBS[bomb]
    begun = time.process_time()
    message = damaged(tmp_path, text)
    assert expected in message
    assert len(message) < 10_000 and len(message.splitlines()) < 25
    assert time.process_time() - begun < 2


def test_an_override_is_bounded_too() -> None:
    with pytest.raises(ConfigError, match=r"--set model\.layer_pattern.*more than 32 levels"):
        load_config("embbert", ["model.layer_pattern=" + "[" * 1000])


def test_a_file_without_end_is_not_read_to_the_end() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: got more than 262,144 bytes"):
        load_config("/dev/zero")


def test_ordinary_aliases_work() -> None:
    data = parse_yaml("a: &x {b: [1, 2]}\nc: *x\nd: [*x, *x]", "here")
    assert data["c"] == data["a"] == data["d"][1] == {"b": [1, 2]}
    assert parse_yaml(dump_yaml(data), "again") == data


def command_cost(folder: Path, *arguments: str) -> tuple[int, float, int, str]:
    """Run a command; return exit code, CPU seconds, peak memory in KiB and stderr."""
    script = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss); sys.stderr.write(done.stderr)"
    )
    command = [sys.executable, "-c", script, sys.executable, "-m", "ultrazoo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    code, seconds, memory = done.stdout.split()
    return int(code), float(seconds), int(memory), done.stderr


def test_a_bomb_costs_a_command_little_more_than_a_valid_file(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("model: {hidden_size: 32, num_heads: 4}\n")
    _, seconds, memory, _ = command_cost(tmp_path, "train", "good.yaml", "--print-config")
    for bomb in ("aliases", "unknown keys"):
        (tmp_path / "bad.yaml").write_text(BOMBS[bomb][0])
        code, more, peak, said = command_cost(tmp_path, "train", "bad.yaml", "--print-config")
        assert code == 2 and said.startswith("error: bad.yaml") and len(said) < 10_000
        assert more < seconds + 2 and peak < memory + 100 * 1024, (bomb, more - seconds, peak - memory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("hostile"))


DEEP = "[" * 100_000


@pytest.mark.parametrize("line", [DEEP, '{"step": ' + "9" * 5_000 + "}"])
def test_a_hostile_line_of_records_is_an_error_with_its_place(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n" * 2)
    for read in (read_metrics, lambda path: read_rows(path / "metrics.jsonl")):
        with pytest.raises(DataError, match=r"metrics\.jsonl:1: got "):
            read(tmp_path)


WRONG: dict[str, list[tuple[str, Any]]] = {
    "manifest.json": [("", DEEP), ("", "[]"), ("files", []), ("files", {"state.json": 1}), ("format_version", {})],
    "state.json": [
        ("", DEEP),
        ("", "5"),
        ("step", "x"),
        ("step", -1),
        ("progress", {"step": [], "nonsense": 1}),
        ("rng", {"python": [3, [1], None]}),
        ("rng", {"python": [3, [0] * 625, None], "numpy": ["MT19937", [0] * 624, 1, 0, 0.0], "torch": "AA=="}),
        ("data", {"epoch": [], "plan": 5}),
        ("watch", {"loss": 1}),
        ("window", [[]]),
    ],
    "receipt.json": [
        ("", DEEP),
        ("plugins", [5]),
        ("plugins", [{}]),
        ("kernels", [1]),
        ("command", 10**30),
        ("data", []),
    ],
    "env.json": [("", DEEP), ("starts", 5), ("starts", [{}]), ("starts", [{"step": 0, "plan": {"max_steps": "x"}}])],
}


@pytest.mark.parametrize(("name", "key", "value"), [(n, k, v) for n, cases in WRONG.items() for k, v in cases])
def test_a_malformed_file_of_a_run_is_one_short_error(
    name: str, key: str, value: Any, trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    path = (run if name == "env.json" else checkpoint) / name
    path.write_text(value if not key else json.dumps({**json.loads(path.read_text()), key: value}))
    manifest = checkpoint / "manifest.json"
    if name in ("state.json", "receipt.json"):
        entries = json.loads(manifest.read_text())
        text = path.read_bytes()
        entries["files"][name] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        manifest.write_text(json.dumps(entries))
    commands = [("inspect", checkpoint), ("inspect", run), ("resume", run, "--verify")]
    if name == "manifest.json":
        commands.append(("fill-mask", run, "a [MASK]"))
    errors = []
    for command in commands:
        capsys.readouterr()
        if call(*command):
            said = capsys.readouterr().err
            assert "Traceback" not in said and len(said) < 3_000
            errors.append(said)
    assert any(name in said for said in errors), errors
