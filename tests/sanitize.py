"""Runs the compiled CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``python tests/sanitize.py``.

csrc is compiled with both and loaded into a Python of its own, which runs every sample of every op, forward and
backward, in each dtype and by each instruction set of this CPU, in memory that ends where the tensors end. The first
error ends it, with the report and status 1. Needs Linux and g++ with its sanitizer libraries.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from ultrazoo.ops import build
from ultrazoo.ops.library import kernel_policy, kernel_status
from ultrazoo.ops.loader import cpu_isa, load, use_cpu_isa
from ultrazoo.registry import registry
from ultrazoo.spec import Sample
from ultrazoo.testing.measure import run
from ultrazoo.testing.parity import isas_of

HEADER = Path(__file__).with_suffix(".h")
FLAGS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-include",
    str(HEADER),
    f"-DSANITIZE_HEADER={zlib.crc32(HEADER.read_bytes())}",  # objects are named after the flags
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=6:quarantine_size_mb=64",  # Python leaves much behind
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
UNSEEN = re.compile(r"\b_mm\d*_\w*(?:mask\w*(?:load|store)|gather|scatter)\w*")
CPU = torch.device("cpu")


def main() -> int:
    """Compile, run the kernels in a process of their own, and return its verdict as an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, default=build.find_sources(), help="csrc, or a copy of it")
    parser.add_argument("--objects", type=Path, help="folder of compiled files to keep")
    parser.add_argument("ops", nargs="*", help="all of them by default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ultrazoo-sanitize-") as scratch:
        library = Path(scratch) / "library.so"
        try:
            check_masked(asked.sources)
            preload = runtime()
            start = time.monotonic()
            build.compile_library(asked.sources, asked.objects or Path(scratch), library, FLAGS)
        except build.BuildError as error:
            print(f"sanitize: {error}", file=sys.stderr)
            return 1
        built = time.monotonic() - start
        command = [sys.executable, "-c", f"import sanitize; sanitize.run_all({str(library)!r}, {asked.ops!r})"]
        path = os.pathsep.join(
            str(each) for each in (HEADER.parent, build.PACKAGE.parent, os.environ.get("PYTHONPATH")) if each
        )
        child = {**os.environ, **OPTIONS, "LD_PRELOAD": preload, "PYTHONPATH": path}
        done = subprocess.run(command, env=child, capture_output=True, text=True, errors="replace")
    *_, last = done.stdout.splitlines() or ["before the first sample"]
    if done.returncode != 0:
        print(f"{done.stderr}\nsanitize: FAILED with status {done.returncode} in: {last}", file=sys.stderr)
        return 1
    print(f"sanitize: clean: {last}; built in {built:.0f} s, run in {time.monotonic() - start - built:.0f} s")
    return 0


def check_masked(sources: Path) -> None:
    """Refuse sources with an access to memory that AddressSanitizer would not see.

    Raises:
        BuildError: There is one.
    """
    known = set(UNSEEN.findall(HEADER.read_text()))
    for file in sorted(path for path in sources.rglob("*") if path.suffix in (".h", ".cpp")):
        missing = sorted(set(UNSEEN.findall(file.read_text())) - known)
        if missing:
            raise build.BuildError(f"{file}: AddressSanitizer does not see {missing}", f"add them to {HEADER.name}")


def runtime() -> str:
    """Return what LD_PRELOAD must hold: AddressSanitizer comes first, and wants the C++ library beside it.

    Raises:
        BuildError: The compiler has no such libraries.
    """
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [*shlex.split(build.find_compiler()), f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            raise build.BuildError(f"{command[0]} has no {name}", "install g++ with its sanitizer libraries; set CXX")
        found.append(str(path.resolve()))
    return " ".join(found)


def run_all(library: str, names: list[str]) -> None:
    """Run the samples with the kernels of ``library``, each named on a line, and what was run on the last.

    Args:
        library: To be loaded in place of the usual one.
        names: Of ops; empty for every op of ultrazoo.
    """
    build.library = lambda **_: Path(library)  # the loader's way to it
    if load().path != Path(library):
        raise SystemExit(f"sanitize: {library} does not load: {load().reason}")
    ops = {name: spec for name, spec in registry().ops().items() if name.startswith("ultrazoo::")}
    chosen = [ops[f"ultrazoo::{name}"] for name in names] or list(ops.values())
    calls, samples, isas, dtypes = 0, 0, set[str](), set[str]()
    for spec in chosen:
        status = kernel_status(spec.name, "cpu")
        if not status.compiled:
            raise SystemExit(f"sanitize: {spec.name} has no compiled kernel: {status.detail}")
        for dtype in spec.dtypes:
            cases = list(spec.samples(CPU, getattr(torch, dtype)))
            dtypes.add(dtype)
            samples += len(cases)
            for isa in isas_of(spec, CPU):
                isas.add(isa or "")
                for case in cases:
                    for label, threads, place in LAYOUTS:
                        print(f"{spec.name}, {dtype}, {isa}, {case.name}, {label}", flush=True)
                        torch.set_num_threads(threads)
                        with kernel_policy("compiled"), use_cpu_isa(isa or cpu_isa() or ""):
                            run(spec, moved(case, place), copy=False)
                        calls += 1
    print(
        f"{len(chosen)} ops, {samples} samples in {len(dtypes)} dtypes ({', '.join(sorted(dtypes))}) by "
        f"{', '.join(sorted(isas))}, in {len(LAYOUTS)} layouts: {calls} calls with their backward"
    )


def moved(sample: Sample, place: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    """Return the sample with its tensors laid out anew."""

    def each(value: object) -> object:
        return place(value) if isinstance(value, torch.Tensor) else value

    kwargs = {name: each(value) for name, value in sample.kwargs.items()}
    return Sample(name=sample.name, args=tuple(each(value) for value in sample.args), kwargs=kwargs)


def _exact(value: torch.Tensor) -> torch.Tensor:
    """Return the numbers in a block of memory that they fill."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _unaligned(value: torch.Tensor) -> torch.Tensor:
    """Return the numbers one element past the start of a block, up to its end."""
    return value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value.detach())


def _strided(value: torch.Tensor) -> torch.Tensor:
    """Return the numbers at every second place of a block, the last one included."""
    if value.dim() == 0:
        return _exact(value)
    buffer = value.new_empty((*value.shape[:-1], 2 * value.shape[-1]))
    return buffer[..., 1::2].copy_(value.detach())


LAYOUTS = (("exact", 1, _exact), ("unaligned", 3, _unaligned), ("strided", 2, _strided))

if __name__ == "__main__":
    sys.exit(main())
