"""Finds the library of compiled kernels, or builds it from csrc/: at install (setup.py) or else at first use.

This file imports nothing of ultrazoo, nor torch, because setup.py runs it before either is there. A build at first use
goes to ``$XDG_CACHE_HOME/ultrazoo/kernels/<key>/``, where the key is a hash of the sources and flags. The library uses
torch's stable ABI alone, so one build serves every torch from ``TORCH_ABI`` on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
KEPT_BUILDS = 8
OPS_WITH_VNNI = frozenset({"bitlinear"})
COMPILER_FIX = "install g++ 11 or clang 14 (or newer), or name one in CXX"
log = logging.getLogger("ultrazoo")


class BuildError(Exception):
    """The kernels cannot be built; ``fix`` says what the user can do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True)
class Step:
    """One file to compile, relative to csrc, with the flags that are its own."""

    source: str
    flags: tuple[str, ...]


def library(broken: Path | None = None, error: str = "") -> Path:
    """Return the library built at install, if it fits the sources, or the cached one, built now if need be.

    Args:
        broken: A library that did not load, to be replaced.
        error: Why it did not.

    Raises:
        BuildError: There is none and none can be built.
    """
    sources = find_sources()
    if AT_INSTALL.exists() and broken != AT_INSTALL:
        if sources is None or _built_from(AT_INSTALL, build_key(sources)):
            return AT_INSTALL
        why = "csrc has changed since the install"
    elif broken is not None:
        why = f"{broken} does not load: {error}"
    else:
        why = "none was compiled at install"
    if sources is None:
        raise BuildError(f"this installation has no csrc, and {why}", "reinstall ultrazoo")
    cached = cache_folder() / build_key(sources)
    if broken != cached / "library.so" and _intact(cached):
        return cached / "library.so"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _lock(cached.parent / "lock"):  # another process may have built it while this one waited
            if broken == cached / "library.so" or not _intact(cached):
                _build_into(cached, sources, why)
    except OSError as problem:
        raise BuildError(
            f"cannot write the kernel cache {cached.parent}: {problem}",
            "free some room there, or set XDG_CACHE_HOME to a folder that can be written",
        ) from problem
    return cached / "library.so"


def find_sources() -> Path | None:
    """Return csrc/ as shipped in the package, or else that of the repository around it."""
    return next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (p / "common/isa.cpp").exists()), None)


def cache_folder() -> Path:
    """Return the folder of the builds made at first use."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultrazoo" / "kernels"


def plan(sources: Path) -> list[Step]:
    """List what is compiled: every op's cpu.cpp once for each instruction set, every bind.cpp, and the dispatch."""
    steps = [Step("common/isa.cpp", ())]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for folder in sorted(p.parent.name for p in sources.glob("*/bind.cpp")):
        for level, (isa, flags) in enumerate(X86_FLAGS.items() if x86 else [("portable", ())]):
            if isa != "avx512vnni" or folder in OPS_WITH_VNNI:
                steps.append(Step(f"{folder}/cpu.cpp", (f"-DUZ_ISA={isa}", f"-DUZ_ISA_LEVEL={level}", *flags)))
        steps.append(Step(f"{folder}/bind.cpp", (f"-DTORCH_TARGET_VERSION={TORCH_ABI}",)))
    return steps


def build_key(sources: Path) -> str:
    """Hash the sources, the flags and the platform."""
    digest = hashlib.sha256(repr((CXX_FLAGS, plan(sources), platform.system(), platform.machine())).encode())
    for file in sorted(p for p in sources.rglob("*") if p.suffix in (".h", ".cpp")):
        digest.update(f"\0{file.relative_to(sources).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    """Return the C++ compiler: CXX, or the first of c++, g++, clang++ on PATH.

    Raises:
        BuildError: There is none, or none for this system.
    """
    if os.name != "posix":
        raise BuildError(f"the kernels are not built on {platform.system()}", "use kernels: auto or reference")
    named = os.environ.get("CXX", "").strip()
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C++ compiler: {named or 'c++, g++ or clang++'} is not on PATH", COMPILER_FIX)


def find_torch() -> Path:
    """Return the folder of the torch package, without importing it.

    Raises:
        BuildError: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed", "install torch 2.13 or newer")
    return Path(spec.submodule_search_locations[0])


def compile_library(sources: Path, objects: Path, target: Path) -> int:
    """Compile csrc into ``target``, and return how many files had to be compiled.

    Args:
        sources: csrc/.
        objects: Folder of object files, named after a hash of what they are made from and so used again while that
            stays the same.
        target: The library, replaced in one move when it is complete.

    Raises:
        BuildError: No compiler, no torch, or an error in the sources, quoted.
    """
    compiler, torch = shlex.split(find_compiler()), find_torch()
    objects, target = objects.resolve(), target.resolve()
    objects.mkdir(parents=True, exist_ok=True)
    jobs: dict[Path, list[str]] = {}
    for step in plan(sources):
        flags = [*CXX_FLAGS, *step.flags, "-I."]
        if step.source.endswith("bind.cpp"):
            flags += ["-isystem", str(torch / "include")]
        elif step.source == "common/isa.cpp":
            flags.append(f'-DUZ_BUILD_KEY="{build_key(sources)}"')
        command = [*compiler, *flags, "-c", step.source]
        digest = hashlib.sha256(repr(command).encode())
        folder = (sources / step.source).parent
        for file in (sources / step.source, *sorted((sources / "common").glob("*.h")), *sorted(folder.glob("*.h"))):
            digest.update(file.read_bytes())
        jobs[objects / f"{digest.hexdigest()[:24]}.o"] = command
    missing = {out: command for out, command in jobs.items() if not out.exists()}
    asked = os.environ.get("MAX_JOBS", "")
    with ThreadPoolExecutor(int(asked) if asked.isdigit() and int(asked) else os.cpu_count()) as pool:
        list(pool.map(lambda out: _compile(missing[out], out, sources), missing))
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    link = [*compiler, "-shared", *undefined, *map(str, jobs), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    _compile(link, target, sources)
    for stale in set(objects.glob("*.o")) - set(jobs):
        stale.unlink(missing_ok=True)
    return len(missing)


def _compile(command: list[str], out: Path, folder: Path) -> None:
    """Run a compiler in csrc, by relative paths: an object is then the same wherever csrc lies."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        result = subprocess.run(
            [*command, "-o", str(partial)], cwd=folder, capture_output=True, text=True, errors="replace"
        )
        if result.returncode != 0:
            raise BuildError(
                f"in {folder}: {shlex.join(command)} failed with status {result.returncode}:\n"
                f"{result.stderr.strip()[-3000:]}",
                COMPILER_FIX,
            )
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _build_into(cached: Path, sources: Path, why: str) -> None:
    compiler = find_compiler()
    log.info("kernels: compiling %d files of csrc, once, because %s, into %s", len(plan(sources)), why, cached)
    start = time.monotonic()
    for unfinished in cached.parent.glob("new-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="new-") as scratch:
        new = Path(scratch) / cached.name
        new.mkdir()
        files = compile_library(sources, cached.parent / "objects", new / "library.so")
        record = {
            "sha256": hashlib.sha256((new / "library.so").read_bytes()).hexdigest(),
            "compiler": compiler,
            "sources": str(sources),
            "files": files,
            "seconds": round(time.monotonic() - start, 1),
        }
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
        record = json.loads((cached / "build.json").read_text())
        digest = hashlib.sha256((cached / "library.so").read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("sha256") == digest


def _built_from(binary: Path, key: str) -> bool:
    return KEY_MARK + key.encode() in binary.read_bytes()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
