"""Compiles csrc/ when torch and a compiler are here; ships csrc/ and configs/ inside the package either way.

The metadata is in pyproject.toml.
"""

import importlib
import shutil
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
folder = types.ModuleType("ultrazoo_build")  # ultrazoo itself cannot be imported where its dependencies are not
folder.__path__ = [str(ROOT / "ultrazoo/ops")]
sys.modules[folder.__name__] = folder
at_install = importlib.import_module("ultrazoo_build.at_install")


class BuildPython(build_py):
    """Puts csrc/ and configs/ beside the modules, where an installed package finds them."""

    def run(self):
        if not self.editable_mode:  # setuptools would ship whatever an earlier build left in build/
            shutil.rmtree(Path(self.build_lib, "ultrazoo"), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for folder in ("csrc", "configs"):
                shutil.copytree(ROOT / folder, Path(self.build_lib, "ultrazoo", folder))


arguments = at_install.kernels("ultrazoo._C", "csrc")
arguments["cmdclass"] = {"build_py": BuildPython, **arguments.get("cmdclass", {})}
setup(**arguments)
