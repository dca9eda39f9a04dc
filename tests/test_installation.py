"""Installations that are damaged or do not fit together: one clear line, and what works goes on working."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

from ultrazoo import distributions
from ultrazoo.distributions import UNKNOWN, version_of

ROOT = Path(__file__).resolve().parents[1]


def install(site: Path, name: str, metadata: str | None, entry_points: str = "", code: str = "") -> None:
    """Write a distribution whose one module has its name."""
    about = site / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (site / f"{name}.py").write_text(code)
    (about / "top_level.txt").write_text(name)
    if metadata is not None:
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {metadata}\n")
    if entry_points:
        (about / "entry_points.txt").write_text(entry_points)


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the distributions of ``site`` are installed."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "ULTRAZOO_DISABLE_PLUGINS": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_distribution_without_metadata_is_named_and_harms_nobody_else(tmp_path: Path) -> None:
    for name in ("half", "gone"):
        install(tmp_path, name, None, f"[ultrazoo]\n{name} = {name}\n")
    install(tmp_path, "fine", "2.0", "[ultrazoo]\nfine = fine\n", "ULTRAZOO_PLUGIN_API = 1\n")
    done = python(tmp_path, "-m", "ultrazoo", "plugins")
    assert done.returncode == 0, done.stderr
    for name in ("half", "gone"):
        assert f"{name} unknown (plugin '{name}')  its installation has no METADATA" in done.stdout
    assert "fine" in done.stdout and "core" in done.stdout and "None" not in done.stdout


def test_an_unknown_version_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "half", None)
    monkeypatch.syspath_prepend(tmp_path)
    assert version_of("half") == version_of("not-installed-at-all") == UNKNOWN
    assert version_of("pytest") == pytest.__version__


FIX = "run: pip install -U 'numpy>=1.26' 'pyarrow>=16'"


def test_a_pyarrow_that_is_too_old_is_one_line(tmp_path: Path) -> None:
    install(tmp_path, "pyarrow", "15.0.2", code="raise SystemExit('it was imported')")
    done = python(tmp_path, "-m", "ultrazoo", "train", "embbert", "--output-dir", str(tmp_path / "run"))
    got = f"got numpy {version_of('numpy')} and pyarrow 15.0.2"
    assert done.returncode == 1 and done.stderr == f"error: {got}: expected pyarrow 16 or newer; {FIX}\n"


@pytest.mark.parametrize("error", ["ImportError('numpy.core.multiarray\\nfailed')", "AttributeError('_ARRAY_API')"])
def test_numpy_and_pyarrow_that_do_not_work_together_are_one_line(tmp_path: Path, error: str) -> None:
    install(tmp_path, "pyarrow", "16.1.0", code=f"raise {error}")
    line = python(tmp_path, "-c", "import ultrazoo.data").stderr.splitlines()[-1]
    got = f"got numpy {version_of('numpy')} and pyarrow 16.1.0: they do not work together: "
    assert got in line and line.endswith(FIX)


def test_the_oldest_versions_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}>={oldest}"' in text for name, oldest in distributions.ARRAYS.items())


@pytest.mark.parametrize("script", ["setup.py", "plugin"])
@pytest.mark.parametrize("version", ["65.5.0", "70.3.0", "76.1"])
def test_an_old_setuptools_is_told_what_to_do(
    tmp_path: Path, script: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setuptools, "__version__", version)
    blocked: Any = None  # as where it is not there
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", blocked)
    for name in [name for name in sys.modules if name.startswith(("ultrazoo_build", "ultrazoo.ops.at_install"))]:
        monkeypatch.delitem(sys.modules, name)
    path = ROOT / "setup.py"
    if script == "plugin":
        path = tmp_path / "setup.py"
        path.write_text("from ultrazoo.ops.at_install import kernels\nkernels('x._C', 'x')\n")
    before = set(sys.modules)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert stopped.value.code == (
        f"error: setuptools: got {version}, expected 77 or newer; run: pip install -U 'setuptools>=77'"
    )
