"""The real kernels, built once more with faults planted in their sources, which a switch turns on one at a time."""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from planted_faults import FAULTS, Fault

from ultrazoo.ops import build, library
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec

OPS = {
    "retention": ("retention.op", "_retention", ("retention_backward", "retention")),
    "selective_scan": ("selective_scan.op", "_scan", ("selective_scan_backward", "selective_scan")),
    "bitlinear": ("bitlinear.op", "_bitlinear", ("bitlinear_backward", "bitlinear")),
    "bitlinear_packed": ("bitlinear.op", "_bitlinear_packed", ("bitlinear_packed",)),
}


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
    original = build.find_sources()
    assert original is not None
    shutil.copytree(original, csrc, dirs_exist_ok=True)
    for number, fault in enumerate(FAULTS, start=1):
        path = csrc / fault.file
        text = path.read_text()
        assert text.count(fault.old) >= 1, f"{fault.name}: {fault.file} has changed: no {fault.old!r} in it"
        head, tail = text.split(fault.old, 1)
        path.write_text(head + fault.new.replace("fault", f"(uz::fault == {number})") + tail)
    types, isa, isa_cpp = (csrc / "common" / name for name in ("types.h", "isa.h", "isa.cpp"))
    types.write_text(types.read_text() + "\nnamespace uz { extern int fault, calls; }\n")
    isa.write_text(isa.read_text().replace("#if defined(__x86_64__)", "#if 0"))  # the portable kernels alone
    switch = "namespace uz { int fault = 0, calls = 0; }\nUZ_EXPORT void ultrazoo_set_fault(int f) { uz::fault = f; }\n"
    isa_cpp.write_text(isa_cpp.read_text() + switch)
    for name in {name for _, _, names in OPS.values() for name in names}:
        for bind in csrc.glob("*/bind.cpp"):
            bind.write_text(bind.read_text().replace(f'm.impl("{name}",', f'm.impl("planted_{name}",'))
    return csrc


def _compile(csrc: Path, target: Path) -> None:
    compiler = shlex.split(build.find_compiler())
    common = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-I."]
    bind = [f"-DTORCH_TARGET_VERSION={build.TORCH_ABI}", "-isystem", str(build.find_torch() / "include")]
    steps = [("common/isa.cpp", ['-DUZ_BUILD_KEY="planted"'])]
    for folder in sorted({fault.file.split("/")[0] for fault in FAULTS}):
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
        self.ops: dict[str, library.Op] = {}
        for op, (module_name, _, names) in OPS.items():
            module = importlib.import_module(f"ultrazoo.ops.{module_name}")
            for name in names:
                self._define(module, name, differentiable=name == op and len(names) == 2)
        torch.ops.load_library(str(path))
        self._switch = ctypes.CDLL(str(path)).ultrazoo_set_fault

    def _define(self, module: Any, name: str, differentiable: bool) -> None:
        schema = str(getattr(torch.ops.ultrazoo, name).default._schema).removeprefix("ultrazoo::")
        gradients = {"setup_context": module._save, "backward": module._gradients} if differentiable else {}
        reference = getattr(module, f"{name}_reference")
        self.ops[name] = library.define(f"planted_{schema}", reference, fake=lambda *_: None, **gradients)

    def turn_on(self, fault: Fault | None) -> None:
        """Turn one fault on, or all of them off."""
        self._switch(0 if fault is None else 1 + FAULTS.index(fault))

    def spec(self, op: str, patch: Any) -> OpSpec:
        """Return the spec of an op; ``patch`` (a MonkeyPatch) makes its public function call the planted op."""
        module, attribute, names = OPS[op]
        patch.setattr(importlib.import_module(f"ultrazoo.ops.{module}"), attribute, self.ops[names[-1]])
        return replace(registry().op(f"ultrazoo::{op}"), name=f"ultrazoo::planted_{op}")

    def forget(self) -> None:
        """Take the throwaway ops out of ultrazoo's list."""
        for name in self.ops:
            del library._ops[f"planted_{name}"]
