"""The part of ``make faults`` that fits into a minute: real runs, really broken, and whole again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="the faults fork and look into /proc")
def test_the_quick_faults_are_survived(tmp_path: Path) -> None:
    table = tmp_path / "faults.json"
    command = [sys.executable, "-m", "faults", "--quick", "--jobs", "1", "--json", str(table)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False, timeout=900)
    rows = json.loads(table.read_text())["faults"] if table.exists() else []
    failed = [f"{row['number']} {row['name']}: {row['happened']}" for row in rows if row["verdict"] != "ok"]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert len(rows) >= 12


def test_every_fault_of_the_list_is_there_or_named_as_another_scripts() -> None:
    command = [sys.executable, "-m", "faults", "--list"]
    listed = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=True).stdout
    numbers = {int("".join(filter(str.isdigit, line.split()[0]))) for line in listed.splitlines()}
    assert numbers == set(range(1, 39))
