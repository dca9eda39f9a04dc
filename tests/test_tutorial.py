"""The commands of the tutorial in docs/plugins.md do what they say, one after another, in a new folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ultrazoo.ops import build

ROOT = Path(__file__).resolve().parents[1]


def tutorial() -> list[str]:
    """The command lines of the marked block."""
    text = (ROOT / "docs/plugins.md").read_text()
    (block,) = re.findall(r"<!-- commands: run by a test -->\n```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"{error}")
    pytest.importorskip("setuptools")
    site, tools = tmp_path / "site", tmp_path / "tools"
    tools.mkdir()
    for name, module in (("ultrazoo", "ultrazoo"), ("pip", "pip")):  # those of this interpreter
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "ULTRAZOO_DISABLE_PLUGINS"}
    environment |= {
        "PATH": f"{tools}{os.pathsep}{environment['PATH']}",
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        # What a test may not do: change this environment, or ask an index for the build tools.
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    environment.pop("PYTEST_CURRENT_TEST", None)
    lines = tutorial()
    assert len(lines) > 7 and lines[0].startswith("ultrazoo new-plugin demo")
    said = {}
    for line in lines:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        said[line.split()[1]] = done.stdout + done.stderr
    assert "demo::gated_mean" in said["plugins"]
    assert "compiled" in said["parity"]
    assert (tmp_path / "runs/demo/checkpoints/latest").exists()
