"""Loads the libraries of compiled kernels, each once per process, and names the instruction set of their CPU kernels.

There is one library for each namespace of ops: ultrazoo's own, and that of every plugin that has kernel sources.
"""

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
from ultrazoo.ops import build, nvcc
from ultrazoo.ops.build import BUILT_IN
from ultrazoo.ops.progress import build_progress

log = logging.getLogger("ultrazoo")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A kernel library, or the reason why there is none and what the user can do."""

    path: Path | None = None
    handle: ctypes.CDLL | None = None
    reason: str = ""
    fix: str = ""
    pending: bool = False
    """True where a build, which was not allowed, may change this."""


_sources: dict[str, Path | None] = {}
_loaded: dict[str, Loaded] = {}
_lacking: dict[tuple[str, int], str] = {}
"""Why the CUDA kernels of a namespace do not run on a GPU, "" where they do."""
_chosen_isa = ""
_lock = threading.Lock()
_builds = True


def declare(namespace: str, sources: Path | None) -> None:
    """Say where the kernels of a plugin's namespace have their sources; None: there are none to compile."""
    _sources[namespace] = sources
    _loaded.pop(namespace, None)
    _lacking.clear()


def sources_of(namespace: str) -> Path | None:
    """Return the folder of a namespace's kernel sources; None where there are none to compile."""
    return build.find_sources() if namespace == BUILT_IN else _sources.get(namespace)


def load(namespace: str = BUILT_IN) -> Loaded:
    """Find or build the library of a namespace and load it; a later call returns what the first one found."""
    with _lock:
        if namespace not in _loaded:
            found = _load(namespace)
            if found.pending:
                return found
            _loaded[namespace] = found
            if found.handle is not None and _chosen_isa:
                found.handle.ultrazoo_set_cpu_isa(_chosen_isa.encode())
        return _loaded[namespace]


@contextmanager
def without_builds() -> Iterator[None]:
    """Load in the body only what is there, and report of the rest that it is not compiled yet."""
    global _builds
    before, _builds = _builds, False
    try:
        yield
    finally:
        _builds = before


def _load(namespace: str) -> Loaded:
    of, sources = None, _sources.get(namespace)
    if namespace != BUILT_IN:
        if sources is None:
            return Loaded(reason=f"{namespace} has no compiled kernels", fix="use kernels: auto")
        of = build.of_plugin(namespace, sources)
    try:
        with build_progress() as report:
            path = build.library(of=of, builds=_builds, report=report)
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                path = build.library(broken=path, error=str(error), of=of, builds=_builds, report=report)
                torch.ops.load_library(str(path))
    except build.BuildError as error:
        return Loaded(reason=error.reason, fix=error.fix, pending=isinstance(error, build.NotBuiltError))
    except OSError as error:
        owner = "ultrazoo" if of is None else of.owner
        reason = f"the library built just now does not load: {error}"
        return Loaded(reason=reason, fix=f"reinstall torch and {owner}")
    handle = ctypes.CDLL(str(path))
    handle.ultrazoo_cpu_isa.restype = ctypes.c_char_p
    return Loaded(path=path, handle=handle)


def cuda_kernels(namespace: str = BUILT_IN) -> build.Made | None:
    """Return the nvcc and architectures of the CUDA kernels; None without any."""
    path = load(namespace).path
    made = build.made_from(path) if path else None
    return made if made and made.archs else None


def lacks_code_for(namespace: str, device: int) -> str:
    """Tell why the CUDA kernels of a namespace do not run on a GPU that is here; "" where they do, or there are none.

    Args:
        namespace: Whose.
        device: Index of the GPU.
    """
    if (namespace, device) not in _lacking:
        if device >= torch.cuda.device_count():  # a fake tensor's
            return ""
        made, (major, minor) = cuda_kernels(namespace), torch.cuda.get_device_capability(device)
        fits = made is None or nvcc.runs_on(made.archs, 10 * major + minor)
        _lacking[namespace, device] = (
            "" if made is None or fits else f"its CUDA code is for {' '.join(made.archs)}, the GPU is {major}.{minor}"
        )
    return _lacking[namespace, device]


def cpu_isa(namespace: str = BUILT_IN) -> str | None:
    """Return what the CPU kernels use: avx512vnni, avx512, avx2 or portable; None without kernels."""
    handle = load(namespace).handle
    return handle.ultrazoo_cpu_isa().decode() if handle else None


@contextmanager
def use_cpu_isa(isa: str, namespace: str = BUILT_IN) -> Iterator[None]:
    """Run a block with the CPU kernels of a lesser instruction set, so that they can be tested too.

    Every library takes it, also one that is loaded within the block.

    Args:
        isa: avx512vnni, avx512, avx2 or portable.
        namespace: Whose kernels must be there.

    Raises:
        KernelUnavailableError: They are not, or this CPU lacks the instruction set.
    """
    global _chosen_isa
    loaded, best = load(namespace), cpu_isa(namespace)
    if loaded.handle is None or best is None:
        raise KernelUnavailableError(f"instruction set {isa!r}: no compiled kernels: {loaded.reason}; {loaded.fix}")
    before = _chosen_isa
    if loaded.handle.ultrazoo_set_cpu_isa(isa.encode()):
        raise KernelUnavailableError(f"instruction set {isa!r}: unknown, or more than this CPU has; it runs {best}")
    try:
        _choose(isa)
        yield
    finally:
        _choose(before)


def _choose(isa: str) -> None:
    """Give every library that is loaded, or will be, an instruction set that this CPU has; "" is the best."""
    global _chosen_isa
    with _lock:
        _chosen_isa = isa
        for loaded in _loaded.values():
            if loaded.handle is not None:
                loaded.handle.ultrazoo_set_cpu_isa(isa.encode())
