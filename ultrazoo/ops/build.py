"""Finds the library of compiled kernels, or builds it from csrc/: at install (setup.py) or else at first use.

This file and the two that it imports know nothing of ultrazoo, nor of torch, because setup.py runs them before either
is there. A build at first use goes to ``$XDG_CACHE_HOME/ultrazoo/kernels/<key>/``: a hash of the sources and flags,
and one of nvcc and its architectures when there are CUDA kernels. The library uses torch's stable ABI alone, so one
build serves every torch from ``TORCH_ABI`` on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Relative, because setup.py has these files in a package of another name, without ultrazoo's dependencies.
from .nvcc import Cuda, device_archs, find_cuda, libraries, runs_on
from .toolkit import BuildError, CudaError, compile_file, find_compiler, find_torch

__all__ = ["BuildError", "CudaError", "find_compiler", "find_cuda", "find_torch"]

PACKAGE = Path(__file__).resolve().parents[1]
AT_INSTALL = PACKAGE / "_C.so"
TORCH_ABI = "0x020d000000000000"  # torch 2.13
KEY_MARK = b"ultrazoo-build-key:"

CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")
X86_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx512vnni": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
}
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-w")
CUDA_RUNTIME = ("-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,libcudart_static.a")
KEPT_BUILDS = 8
OPS_WITH_VNNI = frozenset({"bitlinear"})
log = logging.getLogger("ultrazoo")


@dataclass(frozen=True)
class Step:
    """One file to compile, relative to csrc, with the flags that are its own."""

    source: str
    flags: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        return self.source.endswith(("/cuda.cu", "/bind_cuda.cpp"))


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


def library(broken: Path | None = None, error: str = "") -> Path:
    """Return the library built at install, if it fits the sources, or the cached one, built now if need be.

    Args:
        broken: A library that did not load, to be replaced.
        error: Why it did not.

    Raises:
        BuildError: There is none and none can be built.
    """
    sources = find_sources()
    if sources is None:
        if AT_INSTALL.exists() and broken != AT_INSTALL:
            return AT_INSTALL
        why = "none was compiled at install" if broken is None else f"{broken} does not load: {error}"
        raise BuildError(f"this installation has no csrc, and {why}", "reinstall ultrazoo")
    key, cuda = build_key(sources), _cuda()
    cached = cache_folder() / (f"{key}-{_digest(cuda)}" if cuda else key)
    why = "none was compiled at install" if broken is None else f"{broken} does not load: {error}"
    if AT_INSTALL.exists() and broken != AT_INSTALL:
        made = made_from(AT_INSTALL)
        if made.serves(key, cuda):
            return AT_INSTALL
        why = "csrc has changed since the install" if made.key != key else "that of the install lacks CUDA kernels"
    others = sorted(cached.parent.glob(f"{key}-*"))
    for folder in (cached, *others) if cuda else (*others, cached):
        ours = folder == cached or made_from(folder / "library.so").serves(key, cuda)
        if ours and broken != folder / "library.so" and _intact(folder):
            return folder / "library.so"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _lock(cached.parent / "lock"):  # another process may have built it while this one waited
            if broken == cached / "library.so" or not _intact(cached):
                _build_into(cached, sources, cuda, why)
    except OSError as problem:
        raise BuildError(
            f"cannot write the kernel cache {cached.parent}: {problem}",
            "free some room there, or set XDG_CACHE_HOME to a folder that can be written",
        ) from problem
    return cached / "library.so"


def without_cuda(path: Path) -> BuildError | None:
    """Return why a library has no CUDA kernels; None when it has some."""
    if made_from(path).archs:
        return None
    if path != AT_INSTALL and (failed := _record(path.parent).get("cuda")):
        return BuildError(failed["reason"], failed["fix"])
    try:
        find_cuda()
    except BuildError as error:
        return error
    return BuildError(f"{path} was compiled without them", "reinstall ultrazoo where nvcc is")


def made_from(binary: Path) -> Made:
    """Read in a library what it was made from."""
    try:
        found = re.search(re.escape(KEY_MARK) + rb"(\w+)(?: cuda ([\w.]+) ([\w,+]+))?\0", binary.read_bytes())
    except OSError:
        return Made()
    key, nvcc, archs = (part.decode() if part else "" for part in found.groups()) if found else ("", "", "")
    return Made(key, nvcc, tuple(archs.split(",")) if archs else ())


def find_sources() -> Path | None:
    """Return csrc/ as shipped in the package, or else that of the repository around it."""
    return next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (p / "common/isa.cpp").exists()), None)


def cache_folder() -> Path:
    """Return the folder of the builds made at first use."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultrazoo" / "kernels"


def plan(sources: Path, cuda: Cuda | None = None) -> list[Step]:
    """List what is compiled: the dispatch, and of every op cpu.cpp once for each instruction set, bind.cpp, and cuda.cu
    for all architectures with bind_cuda.cpp."""
    steps = [Step("common/isa.cpp", ())]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for folder in sorted(p.parent.name for p in sources.glob("*/bind.cpp")):
        for level, (isa, flags) in enumerate(X86_FLAGS.items() if x86 else [("portable", ())]):
            if isa != "avx512vnni" or folder in OPS_WITH_VNNI:
                steps.append(Step(f"{folder}/cpu.cpp", (f"-DUZ_ISA={isa}", f"-DUZ_ISA_LEVEL={level}", *flags)))
        steps.append(Step(f"{folder}/bind.cpp", (f"-DTORCH_TARGET_VERSION={TORCH_ABI}",)))
        if cuda is not None and (sources / folder / "cuda.cu").exists():
            steps.append(Step(f"{folder}/cuda.cu", cuda.flags))
            steps.append(Step(f"{folder}/bind_cuda.cpp", (f"-DTORCH_TARGET_VERSION={TORCH_ABI}",)))
    return steps


def build_key(sources: Path) -> str:
    """Hash the sources, the flags and the platform."""
    flags = (CXX_FLAGS, NVCC_FLAGS, plan(sources), platform.system(), platform.machine())
    digest = hashlib.sha256(repr(flags).encode())
    for file in sorted(p for p in sources.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        digest.update(f"\0{file.relative_to(sources).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(
    sources: Path, objects: Path, target: Path, extra: tuple[str, ...] = (), cuda: Cuda | None = None
) -> int:
    """Compile csrc into ``target``, and return how many files had to be compiled.

    Args:
        sources: csrc/.
        objects: Folder of object files, named after a hash of what they are made from and so used again while that
            stays the same.
        target: The library, replaced in one move when it is complete.
        extra: More flags for the C++ compiler, in every file and in the link.
        cuda: Compile the CUDA kernels too, by this nvcc.

    Raises:
        CudaError: What is compiled or linked for the CUDA kernels alone has an error, quoted.
        BuildError: No compiler, no torch, or an error in the sources, quoted.
    """
    compiler, torch = shlex.split(find_compiler()), find_torch()
    objects, target = objects.resolve(), target.resolve()
    objects.mkdir(parents=True, exist_ok=True)
    steps: dict[Path, tuple[list[str], bool]] = {}
    for step in plan(sources, cuda):
        folder, version = (sources / step.source).parent, ""
        if step.source.endswith(".cu") and cuda is not None:
            command, version = [cuda.nvcc, *NVCC_FLAGS, *step.flags, "-I."], cuda.version
        else:
            command = [*compiler, *CXX_FLAGS, *step.flags, *extra, "-I."]
        if step.source.endswith(("/bind.cpp", "/bind_cuda.cpp")):
            command += ["-isystem", str(torch / "include")]
        elif step.source == "common/isa.cpp":
            made = f" cuda {cuda.version} {','.join(cuda.archs)}" if cuda else ""
            command.append(f'-DUZ_BUILD_KEY="{build_key(sources)}{made}"')
        command += ["-c", step.source]
        digest = hashlib.sha256(repr([*command, version]).encode())
        headers = sorted(
            p for home in {sources / "common", folder} for p in home.iterdir() if p.suffix in (".h", ".cuh")
        )
        for file in (sources / step.source, *headers):
            digest.update(file.read_bytes())
        steps[objects / f"{digest.hexdigest()[:24]}.o"] = command, step.is_cuda
    missing = sorted(
        (out for out in steps if not out.exists()), key=lambda out: not steps[out][1]
    )  # CUDA takes longest
    asked = os.environ.get("MAX_JOBS", "")
    with ThreadPoolExecutor(int(asked) if asked.isdigit() and int(asked) else os.cpu_count()) as pool:
        list(pool.map(lambda out: compile_file(*steps[out], out, sources), missing))
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    link = [*compiler, "-shared", *extra, *undefined, *map(str, steps), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if cuda is not None:
        link += [*libraries(cuda.nvcc), *CUDA_RUNTIME]
    compile_file(link, cuda is not None, target, sources)
    for stale in set(objects.glob("*.o")) - set(steps):
        stale.unlink(missing_ok=True)
    return len(missing)


def compile_what_can_be(sources: Path, objects: Path, target: Path, cuda: Cuda | None) -> tuple[int, CudaError | None]:
    """Compile csrc, without the CUDA kernels where these do not compile; return how many files, and why without."""
    try:
        return compile_library(sources, objects, target, cuda=cuda), None
    except CudaError as error:
        return compile_library(sources, objects, target), error


def _cuda() -> Cuda | None:
    try:
        return find_cuda(device_archs())
    except BuildError:
        return None  # without_cuda() tells why, when someone asks


def _digest(cuda: Cuda) -> str:
    """Hash nvcc, its architectures, and what it reads in the environment."""
    settings = [os.environ.get(f"NVCC_{name}") for name in ("CCBIN", "PREPEND_FLAGS", "APPEND_FLAGS")]
    return hashlib.sha256(repr((cuda, settings)).encode()).hexdigest()[:8]


def _build_into(cached: Path, sources: Path, cuda: Cuda | None, why: str) -> None:
    compiler = find_compiler()
    log.info("kernels: compiling %d files of csrc, once, because %s, into %s", len(plan(sources, cuda)), why, cached)
    start = time.monotonic()
    for unfinished in cached.parent.glob("new-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="new-") as scratch:
        new = Path(scratch) / cached.name
        new.mkdir()
        files, failed = compile_what_can_be(sources, cached.parent / "objects", new / "library.so", cuda)
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
            log.warning("kernels: none for CUDA: %s; %s", failed.reason, fix)
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
