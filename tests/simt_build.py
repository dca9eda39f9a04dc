"""Compiles the CUDA kernels of csrc for the emulator of tests/simt, plainly or with a sanitizer."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ultrazoo.ops import build

SIMT = Path(__file__).parent / "simt"
KEPT_FILES = 400


@dataclass(frozen=True)
class Mode:
    """How kernels are compiled, and the sanitizer that has to be loaded before Python."""

    kernels: tuple[str, ...]
    runtime: tuple[str, ...]
    preload: str = ""
    options: tuple[str, str] = ("", "")


MODES = {
    "plain": Mode(
        # misaligned vectors and local arrays are checked here too; ubsan.cpp turns what they find into errors
        kernels=("-O2", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"),
        runtime=("-O2",),
    ),
    "address": Mode(
        kernels=("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        runtime=("-O2", "-fsanitize=address"),
        preload="libasan.so",
        options=("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66"),
    ),
    "thread": Mode(
        kernels=("-O1", "-fsanitize=thread"),
        runtime=("-O2", "-DSIMT_TSAN"),
        preload="libtsan.so",
        options=("TSAN_OPTIONS", "halt_on_error=0:exitcode=66:report_signal_unsafe=0:history_size=2"),
    ),
}
# Uninitialised variables hold a pattern (fp32: -1.7e38), so that reading one shows.
COMMON = ("-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden", "-w")
POISON = ("-ftrivial-auto-var-init=pattern",)


def compiler() -> str:
    """Return g++, whose sanitizers the emulator is written for.

    Raises:
        BuildError: There is none.
    """
    for name in (os.environ.get("CXX", ""), "g++"):
        if name and shutil.which(name) and "clang" not in name:
            return name
    raise build.BuildError("no g++", "install g++ 12 or newer")


def runtime_library(mode: str) -> Path | None:
    """Return the sanitizer's library that Python has to be started with; None where it is missing or not needed."""
    name = MODES[mode].preload
    if not name:
        return None
    answer = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(answer.stdout.strip())
    return path.resolve() if path.is_absolute() else None


def environment(mode: str, log: str = "") -> dict[str, str]:
    """Return the variables that a program with the sanitizer of a mode wants; ``log``: write there, not to stderr."""
    name, options = MODES[mode].options
    if not name:
        return {}
    return {name: f"{options}:log_path={log}" if log else options, "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66"}


def folders() -> list[str]:
    """List the ops that have CUDA kernels."""
    sources = build.find_sources()
    return sorted(path.parent.name for path in sources.glob("*/bind_cuda.cpp")) if sources else []


def compile_probe(mode: str, *, program: bool) -> Path:
    """Return tests/simt/probe.cu as a program or as a library."""
    csrc, cache = build.find_sources(), _cache()
    assert csrc is not None
    objects = [*_runtime(mode, cache), _kernels(SIMT / "probe.cu", mode, csrc, cache)]
    link = [compiler(), *_sanitizers(mode), *map(str, objects), "-ldl", *(() if program else ("-shared",))]
    return _made(link, cache, "" if program else ".so", objects)


def prefix(define: str = "") -> str:
    """Return what stands before the names of emulated ops."""
    return f"simt_{define.lower()}_" if define else "simt_"


def compile_op(folder: str, mode: str = "plain", csrc: Path | None = None, define: str = "") -> Path:
    """Return the library that registers the kernels of csrc/<folder> as CPU kernels of ops of another name.

    Args:
        folder: The op.
        mode: One of ``MODES``.
        csrc: The sources, if not the repository's.
        define: A macro for the kernels, which makes them take a path that nvcc takes for some architectures only.
    """
    csrc = csrc or build.find_sources()
    assert csrc is not None
    cache = _cache()
    objects = _runtime(mode, cache)
    objects += [_kernels(source, mode, csrc, cache, define) for source in sorted((csrc / folder).glob("*.cu"))]
    objects.append(_bindings(csrc / folder / "bind_cuda.cpp", csrc, cache, prefix(define)))
    torch = [f"-L{build.find_torch() / 'lib'}", "-ltorch_cpu"]
    link = [compiler(), "-shared", *_sanitizers(mode), *map(str, objects), *torch]
    return _made(link, cache, ".so", objects)


def _cache() -> Path:
    """Return the folder of everything compiled here, of which the newest files are kept."""
    cache = build.cache_folder().parent / "simt"
    cache.mkdir(parents=True, exist_ok=True)
    for old in sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT_FILES]:
        old.unlink(missing_ok=True)
    return cache


def _sanitizers(mode: str) -> list[str]:
    """Return what links a sanitizer's library; the plain build has its own handlers instead."""
    return [flag for flag in MODES[mode].kernels if flag.startswith("-fsanitize") and mode != "plain"]


def _runtime(mode: str, cache: Path) -> list[Path]:
    command = [compiler(), "-std=c++17", *COMMON, *MODES[mode].runtime, "-c"]
    headers = [*SIMT.glob("*.h")]
    return [_made([*command, str(cpp)], cache, ".o", [cpp, *headers]) for cpp in sorted(SIMT.glob("*.cpp"))]


def _kernels(source: Path, mode: str, csrc: Path, cache: Path, define: str = "") -> Path:
    flags = ["-std=c++17", *COMMON, *POISON, *MODES[mode].kernels, *_fma(), "-DUZ_SIMT"]
    flags += [f"-D{define}"] if define else []
    include = [f"-I{SIMT / 'include'}", f"-I{csrc}"]
    command = [compiler(), *flags, *include, "-x", "c++", "-c", str(source)]
    return _made(command, cache, ".o", [source, *SIMT.rglob("*.h"), *_headers(source, csrc)])


def _bindings(source: Path, csrc: Path, cache: Path, prefix: str) -> Path:
    text = source.read_text().replace('m.impl("', f'm.impl("{prefix}')
    renamed = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.cpp"
    if not renamed.exists():
        partial = renamed.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(f'#line 1 "{source}"\n{text}')
        partial.replace(renamed)
    flags = ["-std=c++20", "-O1", *COMMON, "-DUZ_SIMT", "-DUZ_CUDA_KEY=CPU"]
    torch = [f"-DTORCH_TARGET_VERSION={build.TORCH_ABI}", "-isystem", str(build.find_torch() / "include")]
    command = [compiler(), *flags, *torch, f"-I{csrc}", "-c", str(renamed)]
    return _made(command, cache, ".o", [renamed, *_headers(source, csrc)])


def _headers(source: Path, csrc: Path) -> list[Path]:
    files = [*(csrc / "common").iterdir(), *source.parent.iterdir()]
    return [file for file in files if file.suffix in (".h", ".cuh")]


def _fma() -> list[str]:
    """Let fmaf be one instruction where this CPU has it."""
    info = Path("/proc/cpuinfo")
    return ["-mfma"] if info.exists() and " fma " in info.read_text() else []


def _made(command: list[str], cache: Path, suffix: str, inputs: list[Path]) -> Path:
    """Run a compiler unless it has made the same from the same files before."""
    digest = hashlib.sha256(repr(command).encode())
    for file in sorted(inputs):
        digest.update(file.read_bytes())
    target = cache / (digest.hexdigest()[:24] + suffix)
    if target.exists():
        target.touch()
    else:
        partial = cache / f"{target.name}.{os.getpid()}.tmp"
        result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if result.returncode != 0:
            partial.unlink(missing_ok=True)
            raise build.BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()[-4000:]}", "mend the source")
        partial.replace(target)
    return target
