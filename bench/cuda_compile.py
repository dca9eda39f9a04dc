"""Compiles csrc/*/cuda.cu for one architecture after another, and reads what ptxas and the disassembler say of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ultrazoo.ops import build
from ultrazoo.ops.nvcc import Cuda

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'")
PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
UNNAMED = re.compile(r"\b_GLOBAL__N_\w+::|\(anonymous namespace\)::|\buz::cuda::")


@dataclass
class Loop:
    """Instructions from a label to the branch back to it, by their first name."""

    counts: Counter[str]


@dataclass
class Kernel:
    """One instance of a kernel template, compiled for one architecture."""

    op: str
    mangled: str
    arch: int
    registers: int = 0
    static_shared: int = 0
    stack: int = 0
    spill_bytes: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    """How often each instruction is in the code, such as LDG.E.128; empty without a disassembler."""
    loops: list[Loop] = field(default_factory=list)
    """The innermost ones."""
    name: str = ""
    """With template arguments, such as ``stage_kernel<float, __half>``."""

    @property
    def base(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]


def compile_all(
    ops: Iterable[str], archs: Iterable[int], sources: Path, folder: Path, cuda: Cuda, jobs: int
) -> tuple[list[Kernel], list[Path], list[str]]:
    """Compile every op for every architecture, warnings being errors.

    Returns:
        The kernels; an object file for each op, for its host code; and what failed.
    """
    archs, disassembler = list(archs), find_disassembler(cuda)
    work = [(op, arch) for arch in archs for op in ops]

    def one(task: tuple[str, int]) -> tuple[list[Kernel], Path | None, str]:
        op, arch = task
        with_host = arch == archs[0]
        out = folder / f"{op}.o" if with_host else folder / f"{op}.{arch}.cubin"
        flags = [flag for flag in build.NVCC_FLAGS if flag != "-w"]
        command = [cuda.nvcc, *flags, "-Werror=all-warnings", "-Xptxas=-v", "-I.", f"{op}/cuda.cu", "-o", str(out)]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c" if with_host else "-cubin"]
        done = subprocess.run(command, cwd=sources, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            return [], None, f"{op} for sm_{arch}:\n{(done.stderr + done.stdout).strip()[-2000:]}"
        kernels = read_ptxas(op, done.stderr + done.stdout)
        if disassembler:
            read_sass(kernels, _disassembled(disassembler, out))
        return kernels, out if with_host else None, ""

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(one, work))
    kernels = [kernel for each, _, _ in found for kernel in each]
    give_names(kernels)
    return kernels, [path for _, path, _ in found if path], [problem for _, _, problem in found if problem]


def read_ptxas(op: str, text: str) -> list[Kernel]:
    """Read what ``ptxas -v`` printed."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(op=op, mangled=entry[1], arch=int(entry[2])))
        elif kernels and (found := PROPERTIES.search(line)):
            kernels[-1].stack = max(kernels[-1].stack, int(found[1]))
            kernels[-1].spill_bytes += int(found[2]) + int(found[3])
        elif kernels and (found := USED.search(line)):
            kernels[-1].registers, kernels[-1].static_shared = int(found[1]), int(found[2] or 0)
    return kernels


def find_disassembler(cuda: Cuda) -> str | None:
    """Return cuobjdump, of the toolkit, PATH, or the package nvidia-cuda-cuobjdump (with nvidia-cuda-nvdisasm)."""
    packaged = [path for place in sys.path for path in Path(place).glob("nvidia/cu*/bin/cuobjdump")]
    for path in (Path(cuda.nvcc).resolve().with_name("cuobjdump"), *packaged):
        if path.is_file():
            return str(path)
    return shutil.which("cuobjdump")


def _disassembled(disassembler: str, path: Path) -> str:
    near = str(Path(disassembler).parent)  # it calls nvdisasm
    environment = {**os.environ, "PATH": os.pathsep.join((near, os.environ.get("PATH", "")))}
    done = subprocess.run([disassembler, "-sass", str(path)], capture_output=True, text=True, env=environment)
    return done.stdout if done.returncode == 0 else ""


def read_sass(kernels: list[Kernel], text: str) -> None:
    """Count the instructions of each kernel, in all and in its innermost loops."""
    by_name = {kernel.mangled: kernel for kernel in kernels}
    for part in re.split(r"\bFunction : ", text)[1:]:
        kernel = by_name.get(part.split(maxsplit=1)[0])
        code = [found for line in part.splitlines() if (found := INSTRUCTION.match(line))]
        if kernel is None:
            continue
        kernel.instructions = Counter(found[2] for found in code)
        spans = []
        for found in code:
            target = re.search(r"\b0x([0-9a-f]+)", found[3])
            if found[2] == "BRA" and target and int(target[1], 16) < int(found[1], 16):
                spans.append((int(target[1], 16), int(found[1], 16)))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        kernel.loops = [
            Loop(Counter(found[2].partition(".")[0] for found in code if first <= int(found[1], 16) <= last))
            for first, last in inner
        ]


def give_names(kernels: list[Kernel]) -> None:
    """Set the name of each kernel from its mangled one."""
    names = demangled(sorted({kernel.mangled for kernel in kernels}))
    for kernel in kernels:
        kernel.name = names[kernel.mangled]


def demangled(names: list[str]) -> dict[str, str]:
    """Return the names as they stand in the source, without namespaces, return types and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    told = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(_plain, told.splitlines()), strict=True))


def _plain(name: str) -> str:
    name = UNNAMED.sub("", name).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((?:bool|int|long)\)", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
