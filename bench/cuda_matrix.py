"""What nvcc makes of every CUDA kernel, for every architecture: registers, spills, shared memory, occupancy, times.

``python bench/cuda_matrix.py`` compiles all of csrc with warnings as errors, records by the launchers themselves what
they would launch for every sample, and writes bench/results/cuda_kernels.md and .json. No GPU is needed, and nothing
here is measured on one. Exit status 1: something does not compile, spills, uses local memory, more registers than its
budget in bench/cuda_budget.json, or cannot be launched. ``--quick`` checks two architectures and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from cuda_compile import Kernel, compile_all, demangled, find_disassembler
from cuda_devices import blocks_per_multiprocessor, occupancy
from cuda_launches import Launch, record
from cuda_model import is_shown
from cuda_model import table as model_table

from ultrazoo.ops import build
from ultrazoo.ops.nvcc import Cuda

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "cuda_budget.json"
ARCHS, QUICK = (75, 80, 86, 89, 90, 100, 120), (80, 90)
OLD_ARCHS = (61, 70)
"""Checked too where the toolkit still knows them: one of CUDA 12."""
FIRST_TENSOR_ARCH = 80
"""From here on retention and bitlinear use tensor cores, and fill shared memory without registers between."""
REGISTER_STEP = 8
"""Registers are handed out in eights, so a budget is a multiple of that."""
NOTABLE = (
    "LDG.E.128",
    "STG.E.128",
    "LDGSTS.E.BYPASS.128",
    "LDS.128",
    "FFMA",
    "MUFU",
    "HMMA",
    "IMMA",
    "IDP",
    "BAR",
    "LDL",
    "STL",
)
"""Wide loads and stores, tensor cores, dot products, and local memory, of which there is to be none."""
EXPECTED = {
    r"retention/\w+<(bf16|fp16),": ("HMMA", "LDSM", "LDGSTS.E.BYPASS.128"),
    r"bitlinear/many_tokens_kernel<": ("IMMA", "LDGSTS.E.BYPASS.128"),
    r"(bitlinear/(quantize|absolute_sums|pack|codes|few_tokens|scale)|rk4/\w+)_kernel<": ("LDG.E.128",),
    r"retention/\w+<float,": ("LDG.E.128",),
}
"""What a kernel for sm_80 or later has to have in its code, by ``op/kernel<...``: tensor cores and wide loads."""
MOST_REGISTERS = 128
"""Budget of a kernel that has none recorded."""


def main() -> int:
    """Compile, check, and write; return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="sm_80 and sm_90 alone, and write nothing")
    parser.add_argument("--record", action="store_true", help="make what is found the budget of registers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--sources", type=Path, default=build.find_sources(), help="csrc, or a copy of it")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cuda_kernels", help="without ending")
    asked = parser.parse_args()
    try:
        os.environ["ULTRAZOO_CUDA"] = "1"
        os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
        cuda = build.find_cuda()
    except build.BuildError as error:
        print(f"cuda_matrix: skipped: {error}")
        return 0
    offered = {int(arch.partition("+")[0]) for arch in cuda.archs}
    archs = [arch for arch in (QUICK if asked.quick else (*OLD_ARCHS, *ARCHS)) if arch in offered]
    ops = sorted(path.parent.name for path in asked.sources.glob("*/bind_cuda.cpp"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ultrazoo-cuda-") as scratch:
        kernels, objects, failed = compile_all(ops, archs, asked.sources, Path(scratch), cuda, asked.jobs or 1)
        compiled = time.monotonic() - start
        launches = record(asked.sources, Path(scratch), cuda, objects) if not failed else []
    problems = [*failed, *check(kernels, launches, {} if asked.record else budget())]
    recorded = time.monotonic() - start - compiled
    print(f"cuda_matrix: {len(kernels)} kernels for {len(archs)} architectures by nvcc {cuda.version}:", end=" ")
    print(f"compiled in {compiled:.0f} s, {len(launches)} launches recorded in {recorded:.0f} s")
    if asked.record and not failed:
        BUDGET.write_text(json.dumps(measured_budget(kernels), indent=1, sort_keys=True) + "\n")
        print(f"cuda_matrix: wrote {BUDGET}")
    if not find_disassembler(cuda):
        print(
            "cuda_matrix: no cuobjdump, so no look at instructions and no tables: pip install -r bench/cuda_tools.txt"
        )
    elif not asked.quick and not failed:
        text = [heading(cuda, archs), matrix(kernels, launches, archs), instructions(kernels)]
        text.append(model_table(kernels, launches))
        asked.output.with_suffix(".md").write_text("\n".join(text))
        asked.output.with_suffix(".json").write_text(as_json(cuda, kernels, launches))
        print(f"cuda_matrix: wrote {asked.output}.md and .json")
    for problem in problems:
        print(f"cuda_matrix: FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def budget() -> dict[str, int]:
    """Return the registers that a kernel may use, by ``op/kernel``."""
    return dict(json.loads(BUDGET.read_text())) if BUDGET.exists() else {}


def measured_budget(kernels: Iterable[Kernel]) -> dict[str, int]:
    """Return the most registers of each kernel's instances, rounded up as the hardware does."""
    found: dict[str, int] = {}
    for kernel in kernels:
        rounded = -(-kernel.registers // REGISTER_STEP) * REGISTER_STEP
        found[f"{kernel.op}/{kernel.base}"] = max(rounded, found.get(f"{kernel.op}/{kernel.base}", 0))
    return found


def check(kernels: list[Kernel], launches: list[Launch], allowed: dict[str, int]) -> list[str]:
    """Return a line for every kernel that spills, grows beyond its budget, or cannot be launched."""
    problems = []
    blocks = launched(kernels, launches)
    for kernel in kernels:
        what = f"{kernel.op}: {kernel.name} for sm_{kernel.arch}"
        local = sum(kernel.instructions[name] for name in kernel.instructions if name.startswith(("LDL", "STL")))
        if kernel.spill_bytes:
            problems.append(f"{what} spills: {kernel.spill_bytes} bytes of stores and loads")
        elif kernel.stack or local:
            problems.append(f"{what} keeps {kernel.stack} bytes in local memory; {local} instructions go there")
        if kernel.arch >= FIRST_TENSOR_ARCH and kernel.instructions:
            wanted = {
                name
                for form, names in EXPECTED.items()
                if re.match(form, f"{kernel.op}/{kernel.name}")
                for name in names
            }
            problems += [f"{what} has no {name} in its code" for name in sorted(wanted) if not _count(kernel, (name,))]
        most = allowed.get(f"{kernel.op}/{kernel.base}", MOST_REGISTERS)
        if kernel.registers > most:
            problems.append(f"{what} uses {kernel.registers} registers, its budget is {most}; see --record")
        for threads, shared in blocks.get((kernel.op, kernel.name), ()):
            if not blocks_per_multiprocessor(kernel.arch, kernel.registers, threads, kernel.static_shared + shared):
                problems.append(f"{what} cannot be launched: {threads} threads with {shared} bytes of shared memory")
    names = {(kernel.op, kernel.name) for kernel in kernels}
    problems += [f"{op}: {name} is launched, but was not compiled" for op, name in blocks if (op, name) not in names]
    return problems


def launched(kernels: list[Kernel], launches: Iterable[Launch]) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """Return the blocks, as threads and bytes of dynamic shared memory, that each kernel is launched with."""
    found: dict[tuple[str, str], set[tuple[int, int]]] = {}
    launches = list(launches)
    names = demangled(sorted({launch.kernel for launch in launches}))
    home = {kernel.mangled: kernel.op for kernel in kernels}
    for launch in launches:
        key = home.get(launch.kernel, launch.op), names[launch.kernel]
        found.setdefault(key, set()).add((launch.threads, launch.shared))
    return found


def heading(cuda: Cuda, archs: list[int]) -> str:
    """What the file is."""
    return f"""# CUDA kernels, as compiled

Made by `python bench/cuda_matrix.py`: nvcc {cuda.version}, {" ".join(build.NVCC_FLAGS)}, for
{", ".join(f"sm_{arch}" for arch in archs)}; instructions by cuobjdump. **Nothing in this file was measured on a GPU.**

## Registers and occupancy

A cell is registers of a thread / share of a multiprocessor's warps that are there at a time, by the formula of
cuda_occupancy.h, at the largest block that the samples launch (threads, KiB of shared memory, static and dynamic).
"-": this instance is launched by no sample, so its block is unknown. No kernel spills or uses local memory, unless its
cell says so.
"""


def matrix(kernels: list[Kernel], launches: list[Launch], archs: list[int]) -> str:
    """A row for each kernel, a column for each architecture."""
    blocks = launched(kernels, launches)
    rows: dict[tuple[str, str], dict[int, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.op, kernel.name), {})[kernel.arch] = kernel
    lines = [f"| op | kernel | threads | KiB | {' | '.join(f'sm_{arch}' for arch in archs)} |"]
    lines.append("|" + "---|" * (4 + len(archs)))
    for (op, name), found in sorted(rows.items()):
        threads, shared = max(blocks.get((op, name), {(0, 0)}))
        static = max(kernel.static_shared for kernel in found.values())
        block = f"{threads} | {(static + shared) / 1024:.1f}" if threads else "- | -"
        cells = [_cell(found.get(arch), threads, shared) for arch in archs]
        lines.append(f"| {op} | `{name}` | {block} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(kernel: Kernel | None, threads: int, shared: int) -> str:
    if kernel is None:
        return ""
    cell = str(kernel.registers)
    if threads:
        cell += f" / {occupancy(kernel.arch, kernel.registers, threads, kernel.static_shared + shared):.0%}"
    return f"{cell} **spills {kernel.spill_bytes} bytes**" if kernel.spill_bytes else cell


def instructions(kernels: list[Kernel]) -> str:
    """What of note is in the code for sm_80: wide loads and stores, tensor cores, dot products."""
    shown = [kernel for kernel in kernels if kernel.arch == 80 and kernel.instructions]
    if not shown:
        return ""
    lines = [
        "\n## Instructions for sm_80\n",
        "How often they are in the code. LDL and STL are local memory: there is to be none.\n",
    ]
    lines += [f"| op | kernel | all | {' | '.join(NOTABLE)} |", "|" + "---|" * (3 + len(NOTABLE))]
    for kernel in sorted(shown, key=lambda kernel: (kernel.op, kernel.name)):
        counts = [_count(kernel, (name,)) for name in NOTABLE]
        total = sum(kernel.instructions.values()) - kernel.instructions["NOP"]
        lines.append(
            f"| {kernel.op} | `{kernel.name}` | {total} | {' | '.join(str(count or '') for count in counts)} |"
        )
    return "\n".join(lines) + "\n"


def _count(kernel: Kernel, prefixes: tuple[str, ...]) -> int:
    return sum(count for name, count in kernel.instructions.items() if name.startswith(prefixes))


def as_json(cuda: Cuda, kernels: list[Kernel], launches: list[Launch]) -> str:
    """All that the tables are made of."""
    rows = []
    for kernel in kernels:
        counts = {name: count for name in NOTABLE if (count := _count(kernel, (name,)))}
        row = {key: value for key, value in vars(kernel).items() if key not in ("loops", "mangled")}
        rows.append({**row, "instructions": counts})
    names = demangled(sorted({launch.kernel for launch in launches}))
    made = [{**asdict(launch), "kernel": names[launch.kernel]} for launch in launches if is_shown(launch)]
    lines = [f'"nvcc": {json.dumps(cuda.version)}', f'"flags": {json.dumps(build.NVCC_FLAGS)}']
    for key, found in (("kernels", rows), ("launches", made)):
        lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(each) for each in found) + "\n]")
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    sys.exit(main())
