"""The command line answers at once: torch is imported only by what needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LIBRARIES = "import pydantic, rich.console, rich.table, typer"
MOST = 4
"""Largest processor time, over that of the libraries alone on the same machine at the same moment."""
HEAVY = ("torch", "matplotlib", "pyarrow", "tokenizers", "transformers", "pandas", "scipy")
REPORT = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()):
    {statement}
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""
HELP = """
    sys.argv = ["ultrazoo", *{arguments!r}]
    from ultrazoo.cli import main
    with contextlib.suppress(SystemExit):
        main()
"""


def run(statement: str) -> tuple[set[str], float]:
    """Run a statement in a fresh interpreter; return the top modules it loaded and the processor seconds it took.

    Processor time, so that a busy machine does not fail the test; start-up runs on one thread.
    """
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(statement=statement)], capture_output=True, text=True, check=True
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return set(json.loads(done.stdout)), seconds


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("import ultrazoo", id="import"),
        pytest.param(HELP.format(arguments=["--help"]), id="--help"),
        pytest.param(HELP.format(arguments=["train", "--help"]), id="train --help"),
        pytest.param(HELP.format(arguments=["--version"]), id="--version"),
    ],
)
def test_start_is_light_and_fast(statement: str) -> None:
    seconds: dict[str, list[float]] = {statement: [], LIBRARIES: []}
    for code in (statement, LIBRARIES) * 3:
        modules, taken = run(code)
        seconds[code].append(taken)
        assert not modules.intersection(HEAVY)
    assert min(seconds[statement]) < MOST * min(seconds[LIBRARIES]), seconds
