"""Loads the library of compiled kernels, once per process, and names the instruction set that its CPU kernels use."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ultrazoo.errors import KernelUnavailableError
from ultrazoo.ops import build

log = logging.getLogger("ultrazoo")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The kernel library, or the reason why there is none and what the user can do."""

    path: Path | None = None
    handle: ctypes.CDLL | None = None
    reason: str = ""
    fix: str = ""


_loaded: Loaded | None = None
_lock = threading.Lock()


def load() -> Loaded:
    """Find or build the library and load it; a later call returns what the first one found."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load()
        return _loaded


def _load() -> Loaded:
    try:
        path = build.library()
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            path = build.library(broken=path, error=str(error))
            torch.ops.load_library(str(path))
    except build.BuildError as error:
        return Loaded(reason=error.reason, fix=error.fix)
    except OSError as error:
        return Loaded(reason=f"the library built just now does not load: {error}", fix="reinstall torch and ultrazoo")
    handle = ctypes.CDLL(str(path))
    handle.ultrazoo_cpu_isa.restype = ctypes.c_char_p
    return Loaded(path=path, handle=handle)


def cuda_kernels() -> build.Made | None:
    """Return the nvcc and architectures of the CUDA kernels; None without any."""
    path = load().path
    made = build.made_from(path) if path else None
    return made if made and made.archs else None


def cpu_isa() -> str | None:
    """Return what the CPU kernels use: avx512vnni, avx512, avx2 or portable; None without kernels."""
    handle = load().handle
    return handle.ultrazoo_cpu_isa().decode() if handle else None


@contextmanager
def use_cpu_isa(isa: str) -> Iterator[None]:
    """Run a block with the CPU kernels of a lesser instruction set, so that they can be tested too.

    Raises:
        KernelUnavailableError: There are no kernels, or this CPU lacks the instruction set.
    """
    loaded, before = load(), cpu_isa()
    if loaded.handle is None or before is None:
        raise KernelUnavailableError(f"instruction set {isa!r}: no compiled kernels: {loaded.reason}; {loaded.fix}")
    if loaded.handle.ultrazoo_set_cpu_isa(isa.encode()):
        raise KernelUnavailableError(f"instruction set {isa!r}: unknown, or more than this CPU has; it runs {before}")
    try:
        yield
    finally:
        loaded.handle.ultrazoo_set_cpu_isa(before.encode())
