"""Compiles the CUDA kernels for GPUs that CUDA 13 has dropped, by the run-time compiler of CUDA 12, which PyPI has.

``pip install -r bench/cuda_tools.txt`` brings it: front end, optimiser and ptxas of nvcc 12, as a library that takes
device code alone. So the launchers of a cuda.cu are compiled as device functions too, which nothing calls.
"""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cuda_compile import Kernel, give_names, read_ptxas

HERE = Path(__file__).resolve().parent
ARCHS = (61, 70)
MOST_SPILT = 256
"""Bytes in one kernel. The scans need their 128 registers for newer GPUs' sake; of these they use a few more."""
STAND_INS = {
    # What the launchers name and the compiler does not know by itself.
    "cuda_runtime.h": """#pragma once
template <class F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) { return cudaSuccess; }
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*kernel)(P...), A...) {
  asm volatile("" :: "l"(kernel));
  return cudaSuccess;
}
""",
    "cstdint": "#pragma once\n#include <cuda/std/cstdint>\nusing namespace cuda::std;\n",
}
PROPERTIES = re.compile(r"Function properties for (\w+)")


@dataclass(frozen=True)
class RunTimeCompiler:
    """The library and its folders of headers."""

    library: Path
    headers: tuple[Path, ...]

    def version(self) -> str:
        """Return its version, such as 12.8."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        ctypes.CDLL(str(self.library)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"


def find() -> RunTimeCompiler | None:
    """Return the compiler of bench/cuda_tools.txt where it is installed."""
    for place in map(Path, sys.path):
        libraries = sorted((place / "nvidia/cuda_nvrtc/lib").glob("libnvrtc.so.12"))
        headers = tuple(place / f"nvidia/{part}/include" for part in ("cuda_runtime", "cuda_cccl"))
        if libraries and all(folder.is_dir() for folder in headers):
            return RunTimeCompiler(libraries[0], headers)
    return None


def compile_old(
    ops: Iterable[str], archs: Iterable[int], sources: Path, compiler: RunTimeCompiler
) -> tuple[list[Kernel], list[str]]:
    """Compile every op for every architecture; return the kernels, and what failed."""
    kernels: list[Kernel] = []
    failed: list[str] = []
    for op in ops:
        for arch in archs:
            log, compiled = _compile(op, arch, sources, compiler)
            if compiled:
                kernels += read_ptxas(op, _entries_alone(log))
            else:
                failed.append(f"{op} for sm_{arch} by CUDA {compiler.version()}:\n{log.strip()[-2000:]}")
    give_names(kernels)
    return kernels, failed


def _compile(op: str, arch: int, sources: Path, compiler: RunTimeCompiler) -> tuple[str, bool]:
    library, program, size = ctypes.CDLL(str(compiler.library)), ctypes.c_void_p(), ctypes.c_size_t()
    with tempfile.TemporaryDirectory(prefix="ultrazoo-cuda-") as scratch:
        for name, text in STAND_INS.items():
            Path(scratch, name).write_text(text)
        options = [f"-arch=sm_{arch}", "-std=c++17", "-default-device", "-rdc=true", "-D__CUDACC__", "-Xptxas=-v"]
        options += [f"-I{folder}" for folder in (scratch, sources, *compiler.headers)]
        source = (sources / op / "cuda.cu").read_bytes()
        library.nvrtcCreateProgram(ctypes.byref(program), source, f"{op}/cuda.cu".encode(), 0, None, None)
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode(errors="replace"), status == 0


def _entries_alone(log: str) -> str:
    """Leave out what ptxas says of the launchers: lines after the properties of a function that is no kernel."""
    entries = set(re.findall(r"Compiling entry function '(\w+)'", log))
    kept, keep = [], True
    for line in log.splitlines():
        if found := PROPERTIES.search(line):
            keep = found[1] in entries
        elif "Compiling entry function" in line:
            keep = True
        if keep:
            kept.append(line)
    return "\n".join(kept)


def table(kernels: list[Kernel], version: str) -> str:
    """Return registers and spilt bytes, a row per kernel, as Markdown."""
    at = {(kernel.op, kernel.name, kernel.arch): kernel for kernel in kernels}
    lines = [
        f"# CUDA kernels for sm_61 and sm_70, compiled by CUDA {version}\n",
        "Written by `python bench/cuda_old.py`. Registers a thread, and in brackets the bytes spilt.\n",
        "| op | kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |",
        "| --- | --- |" + " --- |" * len(ARCHS),
    ]
    for op, name in sorted({(op, name) for op, name, _ in at}):
        cells = [at[op, name, arch] for arch in ARCHS]
        said = [f"{k.registers}" + (f" ({k.spill_bytes} B)" if k.spill_bytes else "") for k in cells]
        lines.append(f"| {op} | `{name}` | " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compile csrc for the old architectures, and write what registers it takes and what spills."""
    compiler = find()
    if compiler is None:
        print("cuda_old: skipped: pip install -r bench/cuda_tools.txt")
        return 0
    sources = HERE.parent / "csrc"
    ops = sorted(path.parent.name for path in sources.glob("*/bind_cuda.cpp"))
    kernels, failed = compile_old(ops, ARCHS, sources, compiler)
    worst = max((kernel.spill_bytes for kernel in kernels), default=0)
    print(f"cuda_old: {len(kernels)} kernels by CUDA {compiler.version()}, at most {worst} bytes spilt in one")
    if not failed:
        (HERE / "results/cuda_old.md").write_text(table(kernels, compiler.version()))
    failed += [
        f"{k.op} {k.name} for sm_{k.arch}: spills {k.spill_bytes} bytes, expected at most {MOST_SPILT}"
        for k in kernels
        if k.spill_bytes > MOST_SPILT
    ]
    for problem in failed:
        print(f"cuda_old: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
