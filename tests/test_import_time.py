"""The command line answers at once: torch is imported only by what needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LIMIT_SECONDS = 0.5
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
    runs = [run(statement) for _ in range(3)]
    assert not runs[0][0].intersection(HEAVY)
    assert min(seconds for _, seconds in runs) < LIMIT_SECONDS
