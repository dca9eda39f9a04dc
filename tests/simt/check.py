"""Holds the CUDA kernels to the references on a machine without a GPU: python tests/simt/check.py [OP ...] [--mode M].

The kernels' own sources run thread by thread under the emulator that lies beside this file.

    plain     every check of the parity harness
    address   every sample under AddressSanitizer and UndefinedBehaviorSanitizer: memory out of bounds, in tensors and
              in each piece of shared memory, misaligned vectors, overflows
    thread    every sample under ThreadSanitizer: races between threads and between blocks

Exit status: 0 all passed, 3 something failed, 4 a sanitizer is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simt_build
import simt_run
import torch

from ultrazoo.ops import build

FAILED, UNAVAILABLE = 3, 4
CRASH = re.compile(r"ERROR: AddressSanitizer.*|runtime error:.*|^Fatal Python error.*", re.MULTILINE)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="folders of csrc, or ops; all that have CUDA kernels by default")
    parser.add_argument("--mode", choices=[*simt_build.MODES], default="plain")
    parser.add_argument("--order", choices=["0", "1", "2", "all"], default="0", help="ascending, descending, random")
    parser.add_argument("--seed", type=int, default=1, help="of the random order")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append")
    parser.add_argument("--sample", default="", help="only samples whose name contains this")
    parser.add_argument("--capability", type=int, choices=[*simt_run.SHARED_BYTES], default=90)
    parser.add_argument("--csrc", type=Path, help="kernels of another folder")
    parser.add_argument("--define", default="", help="a macro for the kernels, such as UZ_SIMT_MMA")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(ops: list[str]) -> dict[str, list[str]]:
    """Return the folders to check, each with the ops in it that are wanted (none: all of them)."""
    known, wanted = simt_build.folders(), dict[str, list[str]]()
    for name in ops or known:
        folder = max((f for f in known if name == f or name.startswith(f"{f}_")), key=len, default=None)
        if folder is None:
            sys.exit(f"{name}: no csrc/{name}/bind_cuda.cpp; there is {', '.join(known) or 'none'}")
        wanted.setdefault(folder, []).extend([] if name == folder else [name])
    return wanted


def check(folder: str, ops: list[str], args: argparse.Namespace) -> bool:
    """Run one folder's ops in this process, and print a line for each op, dtype and order."""
    library = simt_build.compile_op(folder, args.mode, args.csrc, args.define)
    emulated = simt_run.Emulated(folder, library, simt_build.prefix(args.define))
    emulated.replace_real_kernels()
    orders = simt_run.ORDERS if args.order == "all" else [simt_run.ORDERS[int(args.order)]]
    ok = True
    for spec in emulated.specs:
        if ops and spec.op.__name__ not in ops:
            continue
        for dtype in (getattr(torch, name) for name in args.dtype or spec.dtypes):
            cases = simt_run.cases_of(spec, dtype, args.sample)
            for order in orders:
                emulated.configure(order, args.seed, args.capability)
                if args.mode == "plain":
                    row = simt_run.parity(
                        spec, dtype, order, cases, opcheck=order == orders[0] and dtype == torch.float32
                    )
                else:
                    row = simt_run.each_sample(spec, dtype, order, cases, simt_run.complaints)
                print(row, flush=True)
                ok &= not row.failures
    return ok


def watched(folder: str, ops: list[str], args: argparse.Namespace) -> bool:
    """Run one folder's ops in a process of their own, started with the sanitizer."""
    mode = simt_build.MODES[args.mode]
    library = simt_build.runtime_library(args.mode)
    if library is None:
        print(f"{mode.preload}: not beside {simt_build.compiler()}")
        sys.exit(UNAVAILABLE)
    simt_build.compile_op(folder, args.mode, args.csrc, args.define)  # not under the sanitizer
    with tempfile.TemporaryDirectory() as scratch:
        log = f"{scratch}/log"
        variables = simt_build.environment(args.mode, log if args.mode == "thread" else "")
        variables |= {"LD_PRELOAD": str(library), "SIMT_LOG": log, "OMP_NUM_THREADS": "1"}
        options = [argument for argument in sys.argv[1:] if argument not in args.ops]
        command = [sys.executable, sys.argv[0], *(ops or [folder]), *options, "--worker"]
        result = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, errors="replace"
        )
    lines = result.stdout.splitlines()
    print("\n".join(line for line in lines if not line.startswith("#")))
    if result.returncode in (0, FAILED):
        return result.returncode == 0
    last = next((line for line in reversed(lines) if line.startswith("#")), "# before the first sample")
    found = CRASH.search(result.stderr)
    frames = [line.strip() for line in result.stderr.splitlines() if "csrc/" in line][:6]
    print(f"{folder:<18} FAILED in {last[2:]}: ended with status {result.returncode}")
    print("\n".join(f"    {line}" for line in [found[0] if found else result.stderr[-1500:], *frames]))
    return False


def main() -> None:
    args, ok = arguments(), True
    for folder, ops in chosen(args.ops).items():
        try:
            ok &= (watched if args.mode != "plain" and not args.worker else check)(folder, ops, args)
        except build.BuildError as error:
            print(f"{folder:<18} FAILED to compile\n{error}")
            ok = False
    sys.exit(0 if ok else FAILED)


if __name__ == "__main__":
    main()
