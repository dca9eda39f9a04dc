"""The real kernels, built once more with faults planted in their sources, which a switch turns on one at a time."""

from __future__ import annotations

import ctypes
import fcntl
import shlex
import subprocess
from pathlib import Path

import throwaway_ops
import torch
from planted_faults import FAULTS
from planting import Fault, plant

from ultrazoo.ops import build

PREFIX = "planted_"
FOLDERS = sorted({fault.file.split("/")[0] for fault in FAULTS} - {"common"})
"""Of the ops with a fault."""
OPS = sorted({fault.op for fault in FAULTS})


def compile_with_faults(home: Path) -> Path:
    """Compile the portable kernels of ``FAULTS``' ops, with every fault in them, under names of their own."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:  # another pytest worker may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = home / "faulty.so"
        if not target.exists():
            _compile(_sources(home / "csrc"), home / "new.so")
            (home / "new.so").rename(target)
    return target


def _sources(csrc: Path) -> Path:
    plant(FAULTS, csrc, "\nnamespace uz { extern int fault, calls; }\n")
    isa, isa_cpp = csrc / "common" / "isa.h", csrc / "common" / "isa.cpp"
    isa.write_text(isa.read_text().replace("#if defined(__x86_64__)", "#if 0"))  # the portable kernels alone
    switch = "namespace uz { int fault = 0, calls = 0; }\nUZ_EXPORT void ultrazoo_set_fault(int f) { uz::fault = f; }\n"
    isa_cpp.write_text(isa_cpp.read_text() + switch)
    for bind in csrc.glob("*/bind.cpp"):
        bind.write_text(bind.read_text().replace('m.impl("', f'm.impl("{PREFIX}'))
    return csrc


def _compile(csrc: Path, target: Path) -> None:
    compiler = shlex.split(build.find_compiler())
    common = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-I."]
    bind = [f"-DTORCH_TARGET_VERSION={build.TORCH_ABI}", "-isystem", str(build.find_torch() / "include")]
    steps = [("common/isa.cpp", ['-DUZ_BUILD_KEY="planted"'])]
    for folder in FOLDERS:
        steps += [(f"{folder}/cpu.cpp", ["-DUZ_ISA=portable", "-DUZ_ISA_LEVEL=0"]), (f"{folder}/bind.cpp", bind)]
    objects = []
    for i, (source, flags) in enumerate(steps):
        objects.append(str(csrc / f"{i}.o"))
        subprocess.run([*compiler, *common, *flags, "-c", source, "-o", objects[-1]], cwd=csrc, check=True)
    subprocess.run(
        [*compiler, "-shared", *objects, f"-L{build.find_torch() / 'lib'}", "-ltorch_cpu", "-o", str(target)],
        check=True,
    )


class Planted:
    """Throwaway ops ``planted_*``, whose kernels are those with the faults."""

    def __init__(self, path: Path) -> None:
        specs = [spec for folder in FOLDERS for spec in throwaway_ops.define(folder, PREFIX)]
        self.specs = {spec.name.removeprefix(f"ultrazoo::{PREFIX}"): spec for spec in specs}
        torch.ops.load_library(str(path))
        self._switch = ctypes.CDLL(str(path)).ultrazoo_set_fault

    def turn_on(self, fault: Fault | None) -> None:
        """Turn one fault on, or all of them off."""
        self._switch(0 if fault is None else 1 + FAULTS.index(fault))

    def forget(self) -> None:
        """Take the throwaway ops out of ultrazoo's list."""
        throwaway_ops.forget(PREFIX)
