"""The process that trains: device, threads, seeds, determinism, and memory that the allocator keeps."""

from __future__ import annotations

import base64
import ctypes
import os
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ultrazoo
from ultrazoo.config import TrainingConfig
from ultrazoo.config.devices import require_device
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.ops import set_kernel_policy

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**31 - 1
FILLING: Any = torch.utils.deterministic
"""Determinism would fill every new tensor with NaN first; that is for finding bugs, and slow."""


def pick_device(wanted: str | torch.device, where: str = "training.device") -> torch.device:
    """Return the device of a name: ``auto`` takes cuda, else mps, else cpu.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        where: Name of the setting, for messages.

    Raises:
        ConfigError: No device is called so, or it is not there.
    """
    try:
        name = require_device(str(wanted))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{where}: got {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "device(s); use cpu or auto, or install a CUDA build of torch"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{where}: got 'mps', but this torch sees no Apple GPU; use cpu or auto")
    return torch.device(name)


def keep_memory() -> bool:
    """Make glibc keep freed memory instead of handing it back to the system after every step.

    Large tensors are otherwise mapped anew at each step and every page of them faults again, which costs a CPU run up
    to a third of its time. The price: the process stays at its peak size. Does nothing without glibc.

    Returns:
        True when the allocator took the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


@contextmanager
def prepared(training: TrainingConfig) -> Iterator[torch.device]:
    """Set threads, seeds, kernel policy and determinism for a run, and put back what was there before."""
    device = pick_device(training.device)
    threads = torch.get_num_threads()
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = FILLING.fill_uninitialized_memory
    if training.num_threads is not None:
        torch.set_num_threads(training.num_threads)
    if training.kernels != "auto":  # auto leaves the choice to ULTRAZOO_KERNELS and --kernels
        set_kernel_policy(training.kernels)
    if device.type == "cpu":
        keep_memory()
        torch.use_deterministic_algorithms(True, warn_only=True)
        FILLING.fill_uninitialized_memory = False
    seed_everything(training.seed)
    try:
        yield device
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        FILLING.fill_uninitialized_memory = fills
        if training.kernels != "auto":
            set_kernel_policy(None)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomState:
    """Every random number generator in the process that a step may draw from, as it stands; cheap to take.

    Args:
        device: The device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=True)
        self._torch = {"torch": torch.get_rng_state()}
        if device.type == "cuda":
            self._torch["cuda"] = torch.cuda.get_rng_state(device)
        if device.type == "mps":
            self._torch["mps"] = torch.mps.get_rng_state()

    def restore(self) -> None:
        """Set the generators back to this state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        _set_torch(self._torch, self._device)

    def to_json(self) -> dict[str, Any]:
        """JSON values that ``set_rng_state`` takes."""
        version, words, gauss = self._python
        name, keys, position, has_gauss, cached = self._numpy
        state = {
            "python": [version, list(words), gauss],
            "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        }
        return state | {name: _encode(tensor) for name, tensor in self._torch.items()}


def rng_state(device: torch.device) -> dict[str, Any]:
    """JSON values of every random number generator in the process that a step may draw from."""
    return RandomState(device).to_json()


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``rng_state`` returned; a device that the state does not know keeps its seed.

    Raises:
        CheckpointError: A generator refuses its state.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        _set_torch({name: _decode(state[name]) for name in ("torch", "cuda", "mps") if name in state}, device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"random numbers of the checkpoint: damaged: {error}; use another checkpoint") from error


def _set_torch(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def note_on_threads(saved: int) -> str:
    """What another number of threads means for a run that continues; empty if it is the same."""
    threads = torch.get_num_threads()
    if threads == saved:
        return ""
    return (
        f"resume: {threads} threads, the checkpoint had {saved}: the run continues, but to the bit only with "
        f"training.num_threads={saved}"
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a run depends on beyond its config: versions, machine, device, threads, command."""
    return {
        "ultrazoo": ultrazoo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "num_threads": torch.get_num_threads(),
        "command": sys.argv,
        "pid": os.getpid(),
    }


def memory_bytes(device: torch.device) -> int:
    """Memory in use: allocated on the GPU, resident in the process on a CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
