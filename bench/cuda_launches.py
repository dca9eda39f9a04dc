"""Which kernels a call of an op launches, with which grid, block and shared memory: found out without a GPU.

The host code that nvcc made of every cuda.cu, and the bindings, are linked with cuda_recorder.cpp in place of the CUDA
runtime, and every sample of every op is run through them, forward and backward, on CPU tensors: the launchers compute
what they would launch, and nothing is computed beyond that.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cuda_devices import DEVICES, Device

from ultrazoo.ops import build
from ultrazoo.ops.nvcc import Cuda

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Launch:
    """One launch, as a call of an op made it."""

    op: str
    sample: str
    dtype: str
    device: str
    backward: bool
    """Of a call with gradients: it has the launches of its forward, and then its own."""
    kernel: str
    """The mangled name."""
    grid: tuple[int, int, int]
    threads: int
    shared: int
    flops: float
    """The least that the call's forward needs, and so are its bytes: the op's own ``cost``."""
    bytes: float

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def record(sources: Path, folder: Path, cuda: Cuda, objects: Iterable[Path]) -> list[Launch]:
    """Link the recorder with object files of nvcc, and return the launches of every sample of every op.

    Args:
        sources: csrc/.
        folder: For the files that are made.
        cuda: Whose headers to use.
        objects: What it made of cuda.cu files.
    """
    compiler, torch = shlex.split(build.find_compiler()), build.find_torch()
    objects, library = list(objects), folder / "recorder.so"
    recorder = Path(__file__).with_name("cuda_recorder.cpp")
    made = [folder / "recorder.o"]
    _run([cuda.nvcc, "-O1", "-Xcompiler=-fPIC", "-c", str(recorder), "-o", str(made[0])])
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DUZ_SIMT", "-DUZ_CUDA_KEY=CPU"]
    flags += [f"-DTORCH_TARGET_VERSION={build.TORCH_ABI}", f"-I{sources}", "-isystem", str(torch / "include")]
    for op in (path.stem for path in objects):
        made.append(folder / f"bind_{op}.o")
        _run([*compiler, *flags, "-c", str(sources / op / "bind_cuda.cpp"), "-o", str(made[-1])])
    files = [*map(str, objects), *map(str, made)]
    _run([*compiler, "-shared", *files, f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,-z,now", "-o", str(library)])
    told = _run([sys.executable, str(Path(__file__)), str(library)])
    return [Launch(**{**found, "grid": tuple(found["grid"])}) for found in map(json.loads, told.splitlines())]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed with status {done.returncode}:\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def _all_launches(library: Path) -> Iterable[Launch]:
    """In a process of its own, whose kernels of the CPU are those that only note their launches."""
    import torch

    from ultrazoo.ops import loader
    from ultrazoo.registry import registry

    specs = registry().ops().values()  # defined before they get kernels
    torch.ops.load_library(str(library))
    loader._loaded[loader.BUILT_IN] = loader.Loaded(path=library)
    recorder = ctypes.CDLL(str(library))
    recorder.recorder_take.restype = ctypes.c_char_p
    cpu = torch.device("cpu")
    for spec in specs:
        if not _is_here(spec.name):
            continue
        for dtype in DTYPES:
            kind = getattr(torch, dtype)
            named = [(f"small: {sample.name}", sample) for sample in spec.samples(cpu, kind)]
            named += [(sample.name, sample) for sample in spec.bench_samples(cpu, kind) if dtype != "float16"]
            for name, sample in named:
                for device in DEVICES:
                    recorder.recorder_device(device.multiprocessors, device.shared_optin, device.arch)
                    yield from _launches_of(recorder, device, spec, sample, name, dtype)


def _is_here(name: str) -> bool:
    """Tell whether an op's launchers are in the library."""
    import torch

    return name.startswith("ultrazoo::") and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"))


def _launches_of(recorder: Any, device: Device, spec: Any, sample: Any, name: str, dtype: str) -> Iterable[Launch]:
    import torch

    from ultrazoo.testing.measure import call, named_arguments

    given, cost = named_arguments(spec, sample), spec.cost(sample)
    recorder.recorder_take()
    for backward in (False, True) if spec.differentiable else (False,):
        wrt = []
        if backward:
            for key, value in given.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point() and key not in spec.constants:
                    given[key] = value.detach().requires_grad_()
                    wrt.append(given[key])
        with torch.set_grad_enabled(backward):
            output = call(spec, given)
        if backward:
            torch.autograd.grad(output, wrt, torch.zeros_like(output), allow_unused=True)
        for line in recorder.recorder_take().decode().splitlines():
            kernel, x, y, z, threads, shared = line.split()
            grid = (int(x), int(y), int(z))
            call_of = (spec.name, name, dtype, device.name, backward)
            yield Launch(*call_of, kernel, grid, int(threads), int(shared), cost.flops, cost.bytes)


if __name__ == "__main__":
    for launch in _all_launches(Path(sys.argv[1])):
        print(json.dumps(asdict(launch)))
