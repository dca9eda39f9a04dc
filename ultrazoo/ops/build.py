"""Finds a library of compiled kernels, or builds it from its sources: at install (setup.py) or else at first use.

This file and those that it imports know nothing of ultrazoo, nor of torch, because setup.py runs them before either is
there. A build at first use goes to ``$XDG_CACHE_HOME/ultrazoo/kernels/<key>/``, a plugin's to
``kernels-<namespace>/<key>/``: a hash of the sources and flags, and one of nvcc and its architectures when there are
CUDA kernels. A library uses torch's stable ABI alone, so one build serves every torch from ``TORCH_ABI`` on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Relative, because setup.py has these files in a package of another name, without ultrazoo's dependencies.
from .compiling import (
    CXX_FLAGS,
    NVCC_FLAGS,
    PACKAGE,
    TORCH_ABI,
    X86_FLAGS,
    build_key,
    check_namespace,
    compile_library,
    compile_what_can_be,
    find_sources,
    folders_of,
    has_cuda,
    has_vnni,
    plan,
)
from .nvcc import Cuda, device_archs, find_cuda, runs_on
from .toolkit import BuildError, CudaError, find_compiler, find_torch

__all__ = [
    "CXX_FLAGS",
    "NVCC_FLAGS",
    "PACKAGE",
    "TORCH_ABI",
    "X86_FLAGS",
    "BuildError",
    "CudaError",
    "compile_library",
    "find_compiler",
    "find_cuda",
    "find_torch",
    "folders_of",
    "has_vnni",
]

BUILT_IN = "ultrazoo"
AT_INSTALL = PACKAGE / "_C.so"
KEY_MARK = b"ultrazoo-build-key:"
KEPT_BUILDS = 8
log = logging.getLogger("ultrazoo")


@dataclass(frozen=True)
class Origin:
    """Where the kernels of a namespace come from."""

    namespace: str
    sources: Path | None
    """None where only what was compiled at install is left."""
    at_install: Path

    @property
    def owner(self) -> str:
        """What to reinstall."""
        return BUILT_IN if self.namespace == BUILT_IN else f"the plugin that has the ops {self.namespace}::"


def built_in() -> Origin:
    """Return the origin of ultrazoo's own kernels."""
    return Origin(BUILT_IN, find_sources(), AT_INSTALL)


def of_plugin(namespace: str, sources: Path) -> Origin:
    """Return the origin of a plugin's kernels, whose install may have left a library beside their sources."""
    return Origin(namespace, sources if sources.is_dir() else None, sources.parent / "_C.so")


@dataclass(frozen=True)
class Made:
    """What a library says it was made from: the key of its sources, and the nvcc and architectures of its kernels."""

    key: str = ""
    nvcc: str = ""
    archs: tuple[str, ...] = ()

    def serves(self, key: str, cuda: Cuda | None) -> bool:
        """True when it is of these sources, and its CUDA kernels run wherever those of ``cuda`` would."""
        wanted = [int(re.sub(r"\D", "", arch)) for arch in cuda.archs] if cuda else []
        return self.key == key and all(runs_on(self.archs, number) for number in wanted)


def library(broken: Path | None = None, error: str = "", of: Origin | None = None) -> Path:
    """Return the library built at install, if it fits the sources, or the cached one, built now if need be.

    Args:
        broken: A library that did not load, to be replaced.
        error: Why it did not.
        of: Whose; None is ultrazoo's own.

    Raises:
        BuildError: There is none and none can be built.
    """
    of = of or built_in()
    sources, installed = of.sources, of.at_install.exists() and broken != of.at_install
    why = "none was compiled at install" if broken is None else f"{broken} does not load: {error}"
    if sources is None:
        if installed:
            return of.at_install
        raise BuildError(f"there are no kernel sources of {of.namespace} here, and {why}", f"reinstall {of.owner}")
    check_namespace(sources, of.namespace)
    key, cuda = build_key(sources), _cuda(sources)
    cached = cache_folder(of.namespace) / (f"{key}-{_digest(cuda)}" if cuda else key)
    if installed:
        made = made_from(of.at_install)
        if made.serves(key, cuda):
            return of.at_install
        stale = made.key != key
        why = f"{sources} has changed since the install" if stale else "that of the install lacks CUDA kernels"
    others = sorted(cached.parent.glob(f"{key}-*"))
    for folder in (cached, *others) if cuda else (*others, cached):
        ours = folder == cached or made_from(folder / "library.so").serves(key, cuda)
        if ours and broken != folder / "library.so" and _intact(folder):
            return folder / "library.so"
    if sys.platform == "win32":
        raise BuildError(f"kernels are not compiled on Windows, and {why}", "use kernels: auto or reference")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _lock(cached.parent / "lock"):  # another process may have built it while this one waited
            if broken == cached / "library.so" or not _intact(cached):
                _build_into(cached, of.namespace, sources, cuda, why)
    except OSError as problem:
        raise BuildError(
            f"cannot write the kernel cache {cached.parent}: {problem}",
            "free some room there, or set XDG_CACHE_HOME to a folder that can be written",
        ) from problem
    return cached / "library.so"


def without_cuda(path: Path, sources: Path | None = None) -> BuildError | None:
    """Return why a library, made of ``sources``, has no CUDA kernels; None when it has some."""
    if made_from(path).archs:
        return None
    if sources is not None and not has_cuda(sources):
        return BuildError(f"{sources} has no CUDA kernels", "use kernels: auto")
    if failed := _record(path.parent).get("cuda"):
        return BuildError(failed["reason"], failed["fix"])
    try:
        find_cuda(device_archs())
    except BuildError as error:
        return error
    return BuildError(f"{path} was compiled without them", "reinstall it where nvcc is")


def made_from(binary: Path) -> Made:
    """Read in a library what it was made from."""
    try:
        found = re.search(re.escape(KEY_MARK) + rb"(\w+)(?: cuda ([\w.]+) ([\w,+]+))?\0", binary.read_bytes())
    except OSError:
        return Made()
    key, nvcc, archs = (part.decode() if part else "" for part in found.groups()) if found else ("", "", "")
    return Made(key, nvcc, tuple(archs.split(",")) if archs else ())


def cache_folder(namespace: str = BUILT_IN) -> Path:
    """Return the folder of the builds made at first use."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultrazoo"
    return home / ("kernels" if namespace == BUILT_IN else f"kernels-{namespace}")


def _cuda(sources: Path) -> Cuda | None:
    try:
        return find_cuda(device_archs()) if has_cuda(sources) else None
    except BuildError:
        return None  # without_cuda() tells why, when someone asks


def _digest(cuda: Cuda) -> str:
    """Hash nvcc, its architectures, and what it reads in the environment."""
    settings = [os.environ.get(f"NVCC_{name}") for name in ("CCBIN", "PREPEND_FLAGS", "APPEND_FLAGS")]
    return hashlib.sha256(repr((cuda, settings)).encode()).hexdigest()[:8]


def _build_into(cached: Path, namespace: str, sources: Path, cuda: Cuda | None, why: str) -> None:
    compiler = find_compiler()
    files = len(plan(sources, cuda))
    log.info("kernels: compiling %d files of %s, once, because %s, into %s", files, sources, why, cached)
    start = time.monotonic()
    for unfinished in cached.parent.glob("new-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="new-") as scratch:
        new = Path(scratch) / cached.name
        new.mkdir()
        try:
            files, failed = compile_what_can_be(sources, cached.parent / "objects", new / "library.so", cuda)
        except BuildError as error:
            if not error.output:
                raise
            said = cached.parent / "errors.txt"
            said.write_text(error.output)
            raise BuildError(error.reason, f"{error.fix} (all it said is in {said})", error.output) from error
        record: dict[str, Any] = {
            "sha256": hashlib.sha256((new / "library.so").read_bytes()).hexdigest(),
            "compiler": compiler,
            "sources": str(sources),
            "files": files,
            "seconds": round(time.monotonic() - start, 1),
        }
        if failed is not None:
            (new / "nvcc.txt").write_text(failed.output)
            fix = f"{failed.fix} (all it said is in {cached / 'nvcc.txt'}; delete that folder to try again)"
            record["cuda"] = {"reason": failed.reason, "fix": fix}
            log.warning("kernels: those of %s are not compiled for CUDA: %s; %s", namespace, failed.reason, fix)
        (new / "build.json").write_text(json.dumps(record, indent=1) + "\n")
        if cached.exists():
            cached.rename(Path(scratch) / "old")
        new.rename(cached)
    builds = sorted(cached.parent.glob("*/build.json"), key=lambda p: p.stat().st_mtime)
    for old in builds[:-KEPT_BUILDS]:
        shutil.rmtree(old.parent, ignore_errors=True)
    log.info("kernels: compiled %d files in %.1f s", files, record["seconds"])


def _intact(cached: Path) -> bool:
    """True when the library is there, with the contents it was written with: a torn one could kill the process."""
    try:
        digest = hashlib.sha256((cached / "library.so").read_bytes()).hexdigest()
    except OSError:
        return False
    return bool(_record(cached).get("sha256") == digest)


def _record(cached: Path) -> dict[str, Any]:
    try:
        record = json.loads((cached / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
