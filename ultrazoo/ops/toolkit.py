"""What the kernels are compiled with: the C++ compiler and torch's headers; and what goes wrong.

Like build.py, this file imports nothing of ultrazoo, nor torch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

MOST_OUTPUT = 100_000
COMPILER_FIX = "install g++ 11 or clang 14 (or newer), or name one in CXX"
ELSE = "where that is not it, the fault is in these sources: tell those who wrote them"


class BuildError(Exception):
    """The kernels cannot be built; ``fix`` says what the user can do, ``output`` is all that the compiler said."""

    def __init__(self, reason: str, fix: str, output: str = "") -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason = reason
        self.fix = fix
        self.output = output


class CudaError(BuildError):
    """The CUDA kernels alone cannot be built."""


def find_compiler() -> str:
    """Return the C++ compiler: CXX, or the first of c++, g++, clang++ on PATH.

    Raises:
        BuildError: There is none, or none for this system.
    """
    if os.name != "posix":
        raise BuildError(f"the kernels are not built on {platform.system()}", "use kernels: auto or reference")
    named = os.environ.get("CXX", "").strip()
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C++ compiler: {named or 'c++, g++ or clang++'} is not on PATH", COMPILER_FIX)


def find_torch() -> Path:
    """Return the folder of the torch package, without importing it.

    Raises:
        BuildError: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed", "install torch 2.13 or newer")
    return Path(spec.submodule_search_locations[0])


def compile_file(command: list[str], is_cuda: bool, out: Path, folder: Path) -> None:
    """Run a compiler in the folder of the sources, by relative paths: an object is then the same wherever that lies.

    Raises:
        CudaError: It fails, and ``is_cuda``.
        BuildError: It fails.
    """
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        result = subprocess.run(
            [*command, "-o", str(partial)], cwd=folder, capture_output=True, text=True, errors="replace"
        )
        if result.returncode != 0:
            status = f"in {folder}: {shlex.join(command)} failed with status {result.returncode}"
            output = f"{status}:\n{result.stderr.strip()[:MOST_OUTPUT]}"
            raise (CudaError if is_cuda else BuildError)(*_in_short(command, result, is_cuda, folder), output)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _in_short(
    command: list[str], result: subprocess.CompletedProcess[str], is_cuda: bool, folder: Path
) -> tuple[str, str]:
    """What failed in one line, and the fix."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    words = ("error", "unsupported", "undefined", "cannot find", "killed")
    telling = (line for line in lines if any(word in line.lower() for word in words))
    said = next(telling, lines[0] if lines else f"status {result.returncode} and not a word")
    if is_cuda and "unsupported" in said and "version" in said:
        return said, "name a C++ compiler that this CUDA toolkit takes in NVCC_CCBIN"
    what = f"{command[0]} fails on {folder / command[-1]}" if "-c" in command else f"{command[0]} cannot link"
    if is_cuda:
        what = what if "-c" in command else f"{what} with CUDA"
        return f"{what}: {said}", f"mend the CUDA toolkit, or name another in CUDA_HOME; {ELSE}"
    return f"{what}: {said}", f"{COMPILER_FIX}; {ELSE}"
