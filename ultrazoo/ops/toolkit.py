"""What the kernels are compiled with: the C++ compiler and torch's headers; and what goes wrong.

Like build.py, this file imports nothing of ultrazoo, nor torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

MOST_OUTPUT = 100_000
CUT_SHORT = re.compile(
    r"\w+ signal terminated program \S+|died due to signal \d+[^\n]*|No space left on device|Disk quota exceeded|"
    r"Cannot allocate memory|virtual memory exhausted[^\n]*|out of memory allocating[^\n]*"
)
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
"""A compiler that ends by these has a fault, which it has the next time too."""
COMPILER_FIX = "install g++ 11 or clang 14 (or newer), or name one in CXX"
ELSE = "where that is not it, the fault is in these sources: tell those who wrote them"


class BuildError(Exception):
    """The kernels cannot be built; ``fix`` says what the user can do, ``output`` is all that the compiler said."""

    def __init__(self, reason: str, fix: str, output: str = "") -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason = reason
        self.fix = fix
        self.output = output


class CudaError(BuildError):
    """The CUDA kernels alone cannot be built."""


class InterruptedBuildError(BuildError):
    """A build was ended from outside, or had no room: that says nothing about the sources, and is never recorded."""


class Compilers:
    """The compilers that run for one build, each in a session of its own, so that all it started ends with it.

    Args:
        umask: For the files that they write; -1 is that of this process.
    """

    def __init__(self, umask: int = -1) -> None:
        self.umask = umask
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()  # a signal handler may stop them in the very thread that starts one
        self._stopped = False

    def run(self, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a compiler in a folder, and return its status and what it wrote to stderr.

        Raises:
            InterruptedBuildError: ``stop`` was called.
        """
        with self._lock:
            if self._stopped:
                raise InterruptedBuildError("the build was interrupted", "start it again: what is compiled is kept")
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                umask=self.umask,
            )
            self._running.add(process)
        if self._stopped:  # by a signal, while the process was started
            self.stop()
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, stderr=said)

    def stop(self) -> None:
        """End those that run, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Stop the compilers at SIGINT, SIGTERM or SIGHUP, then deliver the signal as if there had been no build.

        Only in the main thread, where Python allows signal handlers.

        Raises:
            SystemExit: With 128 + the signal's number, where the signal would have ended the process.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        received: list[signal.Signals] = []

        def handle(number: int, frame: object) -> None:
            received.append(signal.Signals(number))
            with contextlib.suppress(OSError):  # os.write: a handler may interrupt a print to the very same stream
                os.write(
                    2, f"\n{received[-1].name}: the build of the kernels ends; what is compiled is kept\n".encode()
                )
            self.stop()

        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if received and before[received[0]] is signal.SIG_DFL:
                raise SystemExit(128 + received[0])
            if received:
                signal.raise_signal(received[0])


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


def compile_file(command: list[str], is_cuda: bool, out: Path, folder: Path, compilers: Compilers) -> None:
    """Run a compiler in the folder of the sources, by relative paths: an object is then the same wherever that lies.

    Raises:
        InterruptedBuildError: It was ended by a signal, or had no room.
        CudaError: It fails, and ``is_cuda``.
        BuildError: It fails.
    """
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        result = compilers.run([*command, "-o", str(partial)], folder)
        if result.returncode != 0:
            status = f"in {folder}: {shlex.join(command)} failed with status {result.returncode}"
            output = f"{status}:\n{result.stderr.strip()[:MOST_OUTPUT]}"
            if why := _cut_short(result):
                fix = "start it again: what is compiled is kept; where memory is short, set MAX_JOBS=1"
                raise InterruptedBuildError(f"{command[0]} did not finish {folder / command[-1]}: {why}", fix, output)
            raise (CudaError if is_cuda else BuildError)(*_in_short(command, result, is_cuda, folder), output)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _cut_short(result: subprocess.CompletedProcess[str]) -> str:
    """What ended a compiler that did not end by itself; empty for one that refuses its input.

    A driver such as g++ or nvcc ends with a status of its own when a signal ends the compiler that it started.
    """
    found = CUT_SHORT.search(result.stderr)
    if found:
        return found[0]
    number = -result.returncode if result.returncode < 0 else result.returncode - 128
    return f"ended by signal {number}" if number in set(signal.Signals) - CRASHES else ""


def _in_short(
    command: list[str], result: subprocess.CompletedProcess[str], is_cuda: bool, folder: Path
) -> tuple[str, str]:
    """What failed in one line, and the fix."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    words = ("error", "unsupported", "undefined", "cannot find", "killed")
    telling = (line for line in lines if any(word in line.lower() for word in words))
    said = next(telling, lines[0] if lines else f"status {result.returncode} and not a word")
    if is_cuda and "unsupported" in said and "version" in said:
        return said, "name a C++ compiler that this CUDA toolkit takes in NVCC_CCBIN"
    what = f"{command[0]} fails on {folder / command[-1]}" if "-c" in command else f"{command[0]} cannot link"
    if is_cuda:
        what = what if "-c" in command else f"{what} with CUDA"
        return f"{what}: {said}", f"mend the CUDA toolkit, or name another in CUDA_HOME; {ELSE}"
    return f"{what}: {said}", f"{COMPILER_FIX}; {ELSE}"
