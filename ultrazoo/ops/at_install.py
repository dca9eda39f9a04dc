"""Compiles kernel sources when a distribution is built, ultrazoo's or a plugin's; for setup.py.

Without torch or a compiler (an isolated build, for example) the wheel is pure Python, and the kernels are built at
first use. Like build.py, this file imports nothing of ultrazoo, nor torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from . import build
from .nvcc import Cuda

OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"error: setuptools: got {setuptools.__version__}, expected {OLDEST_SETUPTOOLS} or newer; "
        f"run: pip install -U 'setuptools>={OLDEST_SETUPTOOLS}'"
    )
bdist_wheel: Any = importlib.import_module("setuptools.command.bdist_wheel").bdist_wheel  # which older ones lack


def kernels(library: str, sources: Path | str) -> dict[str, Any]:
    """Return the arguments of ``setup()`` that compile ``sources``, where that can be.

    Args:
        library: Dotted name of the compiled file, ``_C`` in the package that holds the sources, as in
            ``ultrazoo_gla._C``.
        sources: Folder of kernel sources, relative to setup.py.
    """
    name = library.partition(".")[0]
    try:
        build.find_torch()
        build.find_compiler()
    except build.BuildError as error:
        print(f"{name}: kernels will be built at first use, not now: {error.reason}", file=sys.stderr)
        return {}
    return {
        "ext_modules": [Kernels(library, Path(sources).resolve())],
        "cmdclass": {"build_ext": BuildKernels, "bdist_wheel": Wheel},
    }


class Kernels(Extension):
    """A library of kernels; where it cannot be compiled, the wheel is made without."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, [], optional=True)
        self.folder = folder


class BuildKernels(build_ext):
    """Compiles one library, which no Python version is tied to."""

    def get_ext_filename(self, fullname: str) -> str:
        """A name without the version of Python."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Kernels) -> None:
        """Compile the folder of the library."""
        target, name, sources = Path(self.get_ext_fullpath(ext.name)), ext.name.partition(".")[0], ext.folder
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            cuda = _nvcc(name) if build.has_cuda(sources) else None
            objects = Path(self.build_temp, "objects")
            files, failed = build.compile_what_can_be(sources, objects, target, cuda)
        except build.BuildError as error:
            raise CompileError(f"{error}\n{error.output}".strip()) from error
        if failed is not None:
            print(f"{failed.output}\n{name}: no CUDA kernels: {failed}", file=sys.stderr)
        print(f"{name}: compiled {files} files into {target}")


class Wheel(bdist_wheel):
    """Tags the wheel for the platform alone: any Python 3, any torch with the stable ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def _nvcc(name: str) -> Cuda | None:
    """The nvcc to compile CUDA kernels with, for all GPUs that it knows; None without one, or with a torch for CPUs."""
    try:
        return build.find_cuda()
    except build.BuildError as error:
        print(f"{name}: no CUDA kernels: {error}", file=sys.stderr)
        return None
