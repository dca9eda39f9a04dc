"""Compiles a folder of kernel sources, ours or a plugin's, into one library.

Like build.py, this file imports nothing of ultrazoo, nor torch. A plugin's sources have the layout of csrc/, without a
``common/`` of their own: its headers, and the choice of an instruction set, come from ultrazoo's.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from .nvcc import Cuda, libraries
from .toolkit import BuildError, Compilers, CudaError, compile_file, find_compiler, find_torch

PACKAGE = Path(__file__).resolve().parents[1]
TORCH_ABI = "0x020d000000000000"  # torch 2.13

CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")
X86_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx512vnni": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
}
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-w")
CUDA_RUNTIME = ("-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,libcudart_static.a")
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
REPORT_SECONDS = 1.0
Report = Callable[[int, int], None]
"""Takes the number of files that are compiled, and of all that have to be; called about once per second."""


@dataclass(frozen=True)
class Step:
    """One file to compile, relative to its sources (or to ours), with the flags that are its own."""

    source: str
    flags: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        return self.source.endswith(("/cuda.cu", "/bind_cuda.cpp"))


def find_sources() -> Path | None:
    """Return csrc/ as shipped in the package, or else that of the repository around it."""
    return next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (p / "common/isa.cpp").exists()), None)


def common_of(sources: Path) -> Path:
    """Return the folder whose ``common/`` the sources of an op include: itself, or else ultrazoo's csrc/.

    Raises:
        BuildError: There is none, or the sources hide it.
    """
    if (sources / "common/isa.cpp").exists():
        return sources
    if (sources / "common").exists():
        raise BuildError(f"{sources / 'common'} hides ultrazoo's own headers", "give that folder another name")
    ours = find_sources()
    if ours is None:
        raise BuildError("this installation of ultrazoo has no csrc, whose common/ is needed", "reinstall ultrazoo")
    return ours


def has_cuda(sources: Path) -> bool:
    """Tell whether any op has CUDA kernels."""
    return any(sources.glob("*/cuda.cu"))


def has_vnni(folder: Path) -> bool:
    """Tell whether an op's kernels.h asks for avx512vnni too, by declaring its table with ``UZ_KERNELS_VNNI``."""
    header = folder / "kernels.h"
    return header.exists() and b"UZ_KERNELS_VNNI(" in header.read_bytes()


def folders_of(sources: Path, op: str) -> list[Path]:
    """Return the folders whose bind.cpp registers an op, by its name without the namespace."""
    wanted = re.compile(rf"\bimpl\(\s*\"{re.escape(op)}\"".encode())
    return [path.parent for path in sorted(sources.glob("*/bind.cpp")) if wanted.search(path.read_bytes())]


def plan(sources: Path, cuda: Cuda | None = None) -> list[Step]:
    """List what is compiled: the dispatch, and of every op cpu.cpp once for each instruction set, bind.cpp, and cuda.cu
    for all architectures with bind_cuda.cpp."""
    steps = [Step("common/isa.cpp", ())]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for folder in sorted(p.parent.name for p in sources.glob("*/bind.cpp")):
        has_kernels = (sources / folder / "cpu.cpp").exists()  # or all is in its bind.cpp
        for level, (isa, flags) in enumerate(X86_FLAGS.items() if x86 else [("portable", ())]) if has_kernels else ():
            if isa != "avx512vnni" or has_vnni(sources / folder):
                steps.append(Step(f"{folder}/cpu.cpp", (f"-DUZ_ISA={isa}", f"-DUZ_ISA_LEVEL={level}", *flags)))
        steps.append(Step(f"{folder}/bind.cpp", (f"-DTORCH_TARGET_VERSION={TORCH_ABI}",)))
        if cuda is not None and (sources / folder / "cuda.cu").exists():
            steps.append(Step(f"{folder}/cuda.cu", cuda.flags))
            steps.append(Step(f"{folder}/bind_cuda.cpp", (f"-DTORCH_TARGET_VERSION={TORCH_ABI}",)))
    return steps


def build_key(sources: Path) -> str:
    """Hash the sources, with what they share of ultrazoo's, the flags and the platform."""
    flags = (CXX_FLAGS, NVCC_FLAGS, plan(sources), platform.system(), platform.machine())
    digest = hashlib.sha256(repr(flags).encode())
    for root in dict.fromkeys((sources, common_of(sources))):
        folder = root if root == sources else root / "common"
        for file in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
            digest.update(f"\0{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def check_namespace(sources: Path, namespace: str) -> None:
    """Refuse sources whose bindings are of another namespace than their library's.

    Raises:
        BuildError: They are, or there is no binding at all.
    """
    bindings = sorted({*sources.glob("*/bind.cpp"), *sources.glob("*/bind_cuda.cpp")})
    if not bindings:
        raise BuildError(f"{sources} has no <op>/bind.cpp", "name the folder that holds a folder for each op")
    for binding in bindings:
        text = binding.read_text(errors="replace")
        for found in re.findall(r"\bSTABLE_TORCH_LIBRARY(?:_IMPL|_FRAGMENT)?\(\s*(\w+)", text):
            if found != namespace:
                raise BuildError(f"{binding} registers kernels for {found}::", f"register them for {namespace}::")


def compile_library(
    sources: Path,
    objects: Path,
    target: Path,
    extra: tuple[str, ...] = (),
    cuda: Cuda | None = None,
    report: Report | None = None,
    umask: int = -1,
) -> int:
    """Compile kernel sources into ``target``, and return how many files had to be compiled.

    Args:
        sources: csrc/, or a plugin's.
        objects: Folder of object files, named after a hash of what they are made from and so used again while that
            stays the same.
        target: The library, replaced in one move when it is complete.
        extra: More flags for the C++ compiler, in every file and in the link.
        cuda: Compile the CUDA kernels too, by this nvcc.
        report: Is called with the progress.
        umask: For the files that are written; -1 is that of this process.

    Raises:
        CudaError: What is compiled or linked for the CUDA kernels alone has an error.
        InterruptedBuildError: A compiler was ended by a signal, or had no room.
        BuildError: No compiler, no torch, or an error in the sources.
        SystemExit: A signal that ends the process came during the build.
    """
    compiler, torch, common = shlex.split(find_compiler()), find_torch(), common_of(sources)
    objects, target = objects.resolve(), target.resolve()
    objects.mkdir(parents=True, exist_ok=True)
    also = [] if common == sources else [f"-I{common.resolve()}"]
    steps: dict[Path, tuple[list[str], bool, Path]] = {}
    for step in plan(sources, cuda):
        root, version = common if step.source.startswith("common/") else sources, ""
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
        for file in (root / step.source, *_headers(step, sources, common)):
            digest.update(file.read_bytes())
        command[-2:-2] = also if root == sources else []
        steps[objects / f"{digest.hexdigest()[:24]}.o"] = command, step.is_cuda, root
    missing = sorted(
        (out for out in steps if not out.exists()), key=lambda out: not steps[out][1]
    )  # CUDA takes longest
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    link = [*compiler, "-shared", *extra, *undefined, *map(str, steps), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if cuda is not None:
        link += [*libraries(cuda.nvcc), *CUDA_RUNTIME]
    compilers = Compilers(umask)
    with compilers.stopped_by_signals():
        _compile({out: steps[out] for out in missing}, compilers, report)
        compile_file(link, cuda is not None, target, sources, compilers)
    for stale in {*objects.glob("*.o"), *objects.glob("*.tmp")} - set(steps):  # .tmp: of a build that was killed
        stale.unlink(missing_ok=True)
    return len(missing)


def _compile(steps: dict[Path, tuple[list[str], bool, Path]], compilers: Compilers, report: Report | None) -> None:
    """Run the compilers, as many at a time as MAX_JOBS says, or else as there are cores."""
    asked = os.environ.get("MAX_JOBS", "")
    jobs = int(asked) if asked.isdigit() and int(asked) else os.cpu_count()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            pending = {pool.submit(compile_file, *step[:2], out, step[2], compilers) for out, step in steps.items()}
            while pending:
                if report is not None:
                    report(len(steps) - len(pending), len(steps))
                done, pending = wait(pending, REPORT_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
            if report is not None:
                report(len(steps), len(steps))
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, BuildError):  # a signal handler raised it
                compilers.stop()
            raise


def compile_what_can_be(
    sources: Path, objects: Path, target: Path, cuda: Cuda | None, report: Report | None = None, umask: int = -1
) -> tuple[int, CudaError | None]:
    """Compile sources, without the CUDA kernels where these do not compile; return how many files, and why without."""
    try:
        return compile_library(sources, objects, target, cuda=cuda, report=report, umask=umask), None
    except CudaError as error:
        return compile_library(sources, objects, target, report=report, umask=umask), error


def _headers(step: Step, sources: Path, common: Path) -> list[Path]:
    """Return the headers that may make a difference to a file: those of its folder, of common/, and of the folders that
    any of these name in an include; .cuh only for CUDA."""
    suffixes, own = (".h", ".cuh") if step.is_cuda else (".h",), step.source.partition("/")[0]
    names, found = {"common", own}, dict[str, list[Path]]()
    while names - found.keys():
        name = min(names - found.keys())
        folder = next((root / name for root in (sources, common) if (root / name).is_dir()), None)
        found[name] = sorted(p for p in folder.iterdir() if p.suffix in suffixes) if folder else []
        source = sources / step.source
        for file in (*found[name], *([source] if name == own and source.exists() else [])):
            named = re.findall(rb"^\s*#\s*include\s*\"([\w.-]+)/", file.read_bytes(), re.MULTILINE)
            names |= {folder_name.decode() for folder_name in named}
    at_root = [] if sources == common else sorted(p for p in sources.iterdir() if p.suffix in suffixes)
    return [*at_root, *(file for name in sorted(found) for file in found[name])]
