"""Compiles csrc/ when torch and a compiler are here; ships csrc/ and configs/ inside the package either way.

Without them (an isolated build, for example) the wheel is pure Python, and the kernels are built at first use. The
metadata is in pyproject.toml.
"""

import importlib
import shutil
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
folder = types.ModuleType("ultrazoo_build")  # ultrazoo itself cannot be imported where its dependencies are not
folder.__path__ = [str(ROOT / "ultrazoo/ops")]
sys.modules[folder.__name__] = folder
kernels = importlib.import_module("ultrazoo_build.build")

try:
    kernels.find_torch()
    kernels.find_compiler()
    compiled = True
except kernels.BuildError as error:
    compiled = False
    print(f"ultrazoo: kernels will be built at first use, not now: {error.reason}", file=sys.stderr)


class BuildPython(build_py):
    """Puts csrc/ and configs/ beside the modules, where an installed package finds them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in ("csrc", "configs"):
                target = Path(self.build_lib, "ultrazoo", folder)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(ROOT / folder, target)


class BuildKernels(build_ext):
    """Compiles the one library, which no Python version is tied to."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            objects = Path(self.build_temp, "objects")
            files, failed = kernels.compile_what_can_be(ROOT / "csrc", objects, target, nvcc())
        except kernels.BuildError as error:
            raise CompileError(str(error)) from error
        if failed is not None:
            print(f"{failed.output}\nultrazoo: no CUDA kernels: {failed}", file=sys.stderr)
        print(f"ultrazoo: compiled {files} files into {target}")


def nvcc():
    """The nvcc to compile CUDA kernels with, for all GPUs that it knows; None without one, or with a torch for CPUs."""
    try:
        return kernels.find_cuda()
    except kernels.BuildError as error:
        print(f"ultrazoo: no CUDA kernels: {error}", file=sys.stderr)
        return None


class Wheel(bdist_wheel):
    """Tags the wheel for the platform alone: any Python 3, any torch with the stable ABI."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if compiled else (python, abi, platform)


setup(
    ext_modules=[Extension("ultrazoo._C", [], optional=True)] if compiled else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": Wheel},
)
