"""Compiles csrc/ when torch and a compiler are here; ships csrc/ and configs/ inside the package either way.

Without them (an isolated build, for example) the wheel is pure Python, and the kernels are built at first use. The
metadata is in pyproject.toml.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "ultrazoo/ops/build.py")
kernels = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernels  # dataclasses look their module up
spec.loader.exec_module(kernels)

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
            files = kernels.compile_library(ROOT / "csrc", Path(self.build_temp, "objects"), target)
        except kernels.BuildError as error:
            raise CompileError(str(error)) from error
        print(f"ultrazoo: compiled {files} files into {target}")


class Wheel(bdist_wheel):
    """Tags the wheel for the platform alone: any Python 3, any torch with the stable ABI."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if compiled else (python, abi, platform)


setup(
    ext_modules=[Extension("ultrazoo._C", [], optional=True)] if compiled else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": Wheel},
)
