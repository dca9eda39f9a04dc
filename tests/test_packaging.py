"""What is in the wheel, made with a compiler and without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import plugin_sources
import pytest

from ultrazoo.ops import build

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = """
from setuptools import setup
from ultrazoo.ops.at_install import kernels
compiled = kernels("ultrazoo_demo._C", "ultrazoo_demo/csrc")
setup(name="ultrazoo-demo", packages=["ultrazoo_demo"], package_data={"ultrazoo_demo": ["csrc/**/*"]}, **compiled)
"""
pytest.importorskip("setuptools", "77", reason="the wheel is built by setuptools")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with one op in csrc."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    copy = tmp_path_factory.mktemp("project")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.parquet", "csrc")
    shutil.copytree(ROOT / "ultrazoo", copy / "ultrazoo", ignore=skip)
    for folder in ("configs", "csrc/common", "csrc/rk4"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "torch.txt"):
        shutil.copy(ROOT / file, copy / file)
    return copy


def wheel(project: Path, out: Path, **environment: str) -> tuple[str, set[str]]:
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(out), "--bdist-dir", str(out / "tmp")]
    subprocess.run(
        command, cwd=project, env={**os.environ, "ULTRAZOO_CUDA": "0", **environment}, check=True, capture_output=True
    )
    (made,) = out.glob("*.whl")
    return made.name, set(zipfile.ZipFile(made).namelist())


def test_without_a_compiler_the_wheel_is_pure_and_carries_the_sources(project: Path, tmp_path: Path) -> None:
    stale = {"ultrazoo/removed.py", "ultrazoo/_C.so", "ultrazoo/csrc/removed/cpu.cpp", "ultrazoo/configs/removed.yaml"}
    for file in stale:  # of an earlier version, in the build folder
        (project / "build/lib" / file).parent.mkdir(parents=True, exist_ok=True)
        (project / "build/lib" / file).touch()
    name, files = wheel(project, tmp_path, CXX="no-such-compiler")
    assert name.endswith("-py3-none-any.whl")
    assert not stale & files
    wanted = {
        "ultrazoo/csrc/rk4/cpu.cpp",
        "ultrazoo/csrc/common/simd.h",
        "ultrazoo/configs/embbert.yaml",
        "ultrazoo/py.typed",
    }
    assert wanted <= files


def test_with_a_compiler_the_wheel_has_the_kernels_for_any_python(project: Path, tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(error.reason)
    name, files = wheel(project, tmp_path)
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert {"ultrazoo/_C.so", "ultrazoo/csrc/rk4/cpu.cpp"} <= files
    library = tmp_path / "_C.so"
    with zipfile.ZipFile(tmp_path / name) as archive:
        library.write_bytes(archive.read("ultrazoo/_C.so"))
    assert build.made_from(library).key == build.build_key(project / "csrc")


def test_a_plugin_compiles_its_kernels_by_the_same_means(tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(error.reason)
    home = tmp_path / "home"
    sources = plugin_sources.install(home, "demo")
    shutil.rmtree(home / "ultrazoo_demo-0.3.0.dist-info")
    (home / "setup.py").write_text(PLUGIN)
    name, files = wheel(home, tmp_path, PYTHONPATH=str(ROOT), CXX=f"{build.find_compiler()} -O0")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert {"ultrazoo_demo/_C.so", "ultrazoo_demo/csrc/scale_add/cpu.cpp"} <= files
    plugin = build.of_plugin("demo", sources)
    with zipfile.ZipFile(tmp_path / name) as archive:
        plugin.at_install.write_bytes(archive.read("ultrazoo_demo/_C.so"))
    assert build.made_from(plugin.at_install).key == build.build_key(sources)
    assert build.library(of=plugin) == plugin.at_install
