"""Finds a library of compiled kernels, or builds it from its sources: at install (setup.py) or else at first use.

This file and those that it imports know nothing of ultrazoo, nor of torch, because setup.py runs them before either is
there; only a build at first use needs ``ultrazoo.caches``. It goes to ``$XDG_CACHE_HOME/ultrazoo/kernels/<key>/``, a
plugin's to ``kernels-<namespace>/<key>/``: a hash of the sources and flags, and one of nvcc and its architectures when
there are CUDA kernels. As torch's stable ABI alone is used, one build serves every torch from ``TORCH_ABI`` on.
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
    Report,
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
from .nvcc import Cuda, find_cuda, find_cuda_here, runs_on
from .toolkit import BuildError, CudaError, InterruptedBuildError, find_compiler, find_torch

__all__ = [
    "CXX_FLAGS",
    "NVCC_FLAGS",
    "PACKAGE",
    "TORCH_ABI",
    "X86_FLAGS",
    "BuildError",
    "CudaError",
    "InterruptedBuildError",
    "NotBuiltError",
    "compile_library",
    "find_compiler",
    "find_cuda",
    "find_cuda_here",
    "find_torch",
    "folders_of",
    "has_vnni",
]

BUILT_IN = "ultrazoo"
AT_INSTALL = PACKAGE / "_C.so"
KEY_MARK = b"ultrazoo-build-key:"
KEPT_BUILDS = 8
PRIVATE, PRIVATE_UMASK = 0o700, 0o077
log = logging.getLogger("ultrazoo")


class NotBuiltError(BuildError):
    """The kernels can be built, but have not been yet, and it was not asked for."""


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


def library(
    broken: Path | None = None,
    error: str = "",
    of: Origin | None = None,
    *,
    builds: bool = True,
    report: Report | None = None,
) -> Path:
    """Return the library built at install, if it fits the sources, or the cached one, built now if need be.

    Args:
        broken: A library that did not load, to be replaced.
        error: Why it did not.
        of: Whose; None is ultrazoo's own.
        builds: False: build nothing.
        report: Is called with the progress of a build.

    Raises:
        NotBuiltError: There is none, one could be built, and ``builds`` is False.
        InterruptedBuildError: The build was ended from outside.
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
    if installed:
        made = made_from(of.at_install)
        if made.serves(key, cuda):
            return of.at_install
        stale = made.key != key
        why = f"{sources} has changed since the install" if stale else "that of the install lacks CUDA kernels"
    folder = cache_folder(of.namespace)
    cached = folder / (f"{key}-{_digest(cuda)}" if cuda else key)
    others = sorted(folder.glob(f"{key}-*"))
    for found in (cached, *others) if cuda else (*others, cached):
        ours = found == cached or made_from(found / "library.so").serves(key, cuda)
        if ours and broken != found / "library.so" and _intact(found):
            return found / "library.so"
    if sys.platform == "win32":
        raise BuildError(f"kernels are not compiled on Windows, and {why}", "use kernels: auto or reference")
    if not builds:
        find_compiler()
        later = f"`ultrazoo doctor --build`, or the first command that needs them, compiles them into {cached}"
        raise NotBuiltError(f"not compiled yet ({len(plan(sources, cuda))} files): {why}", later)
    try:
        with _lock(folder / "lock"):  # another process may have built it while this one waited
            if broken == cached / "library.so" or not _intact(cached):
                _build_into(cached, of.namespace, sources, cuda, why, report)
    except OSError as problem:
        raise _cannot_write(folder, problem) from problem
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
        find_cuda_here()
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
    """Return the folder of the builds made at first use, where nobody else can write.

    Raises:
        BuildError: It cannot be made.
    """
    from ultrazoo.caches import UntrustedError, cache_home, private_folder

    name = "kernels" if namespace == BUILT_IN else f"kernels-{namespace}"
    try:
        return private_folder(name)
    except UntrustedError as error:
        raise BuildError(f"no folder is safe to load kernels from: {error.reason}", error.fix) from error
    except OSError as problem:
        raise _cannot_write(cache_home() / name, problem) from problem


def _cannot_write(folder: Path, problem: OSError) -> BuildError:
    fix = "free some room there, or set XDG_CACHE_HOME to a folder that can be written"
    return BuildError(f"cannot write the kernel cache {folder}: {problem}", fix)


def _cuda(sources: Path) -> Cuda | None:
    try:
        return find_cuda_here() if has_cuda(sources) else None
    except BuildError:
        return None  # without_cuda() tells why, when someone asks


def _digest(cuda: Cuda) -> str:
    """Hash nvcc, its architectures, and what it reads in the environment."""
    settings = [os.environ.get(f"NVCC_{name}") for name in ("CCBIN", "PREPEND_FLAGS", "APPEND_FLAGS")]
    return hashlib.sha256(repr((cuda, settings)).encode()).hexdigest()[:8]


def _build_into(cached: Path, space: str, sources: Path, cuda: Cuda | None, why: str, report: Report | None) -> None:
    compiler = find_compiler()
    count = len(plan(sources, cuda))
    log.info("kernels: compiling %d files of %s, once, because %s, into %s", count, sources, why, cached)
    start = time.monotonic()
    for unfinished in cached.parent.glob("new-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="new-") as scratch:
        new = Path(scratch) / cached.name
        new.mkdir(mode=PRIVATE)
        (objects := cached.parent / "objects").mkdir(mode=PRIVATE, exist_ok=True)
        try:
            files, failed = compile_what_can_be(sources, objects, new / "library.so", cuda, report, PRIVATE_UMASK)
        except BuildError as error:
            if not error.output:
                raise
            said = cached.parent / "errors.txt"
            said.write_text(error.output)
            raise type(error)(error.reason, f"{error.fix} (all it said is in {said})", error.output) from error
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
            log.warning("kernels: those of %s are not compiled for CUDA: %s; %s", space, failed.reason, fix)
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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("kernels: another process compiles into %s; waiting for it", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
