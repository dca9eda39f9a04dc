"""What the numbers are measured on, and the two ceilings that are measured beside them."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import ultrazoo
from ultrazoo.bench.timing import Case
from ultrazoo.ops import loader

GEMM_SIZE = 1024
COPY_NUMBERS = 16 * 1024 * 1024
GEMM, COPY = "ceiling: gemm", "ceiling: copy"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine and versions; the same for every row of a run."""

    name: str
    device: str
    cores: int
    threads: int
    cpu_kernels: str | None
    """Instruction set of the compiled CPU kernels; None without any."""
    library: str | None
    """Start of the SHA-256 of the library of compiled kernels: rows with the same one ran the same kernels."""
    system: str
    python: str
    torch: str
    ultrazoo: str
    clock: str
    """``wall``, or ``cpu``: the time that the cores spent on the process."""
    load: float | None
    """Processes that wanted a core over the last minute, when the run began."""

    @property
    def is_busy(self) -> bool:
        """Whether other work may slow down threads that wait for each other."""
        return self.load is not None and self.device == "cpu" and self.load + self.threads > 1.25 * self.cores

    def __str__(self) -> str:
        where = f"{self.threads} thread(s) of {self.cores} core(s)" if self.device == "cpu" else self.device
        parts = [self.name, where, *([f"kernels {self.cpu_kernels}"] if self.cpu_kernels else [])]
        busy = [] if self.load is None else [f"load {self.load:.1f}"]
        if self.clock != "wall":
            parts.append(f"{self.clock} time")
        return ", ".join([*parts, f"torch {self.torch}", f"ultrazoo {self.ultrazoo}", self.system, *busy])


def describe(device: torch.device, clock: str = "wall") -> Machine:
    """Describe this machine as it is now; the first call in a process loads the kernels."""
    return Machine(
        name=_name(device),
        device=str(device),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        cpu_kernels=loader.cpu_isa() if device.type == "cpu" else None,
        library=_library(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        ultrazoo=ultrazoo.__version__,
        clock=clock,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Case, float]]:
    """Return name -> (function, work of one call): a matrix product in flops, a copy in bytes read and written."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    source = torch.ones(COPY_NUMBERS, device=device)
    target, product = torch.empty_like(source), torch.empty_like(a)
    return {
        GEMM: (lambda: torch.mm(a, b, out=product), 2.0 * GEMM_SIZE**3),
        COPY: (lambda: target.copy_(source), 8.0 * COPY_NUMBERS),
    }


def _library() -> str | None:
    path = loader.load().path
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else None


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
