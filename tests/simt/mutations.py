"""Plants faults in the CUDA sources and tells which check catches each: python tests/simt/mutations.py [OP ...].

Every op is compiled once for each mode, with all of its faults, which a switch turns on one at a time in a process of
its own; those in a path of tensor cores in a build that takes it, for bf16. A fault goes through the modes in the order
plain, address, thread until one of them fails. In the plain mode threads run in three orders.

Exit status: 0 at least 90 % are caught, and the same build passes without faults; 3 otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import planting
import simt_build
import simt_run
import torch
from simt_faults import FAULTS, MMA_FAULTS

LEAST, FAILED = 0.9, 3
PATIENCE = 5  # times the CPU seconds that the build takes without a fault, before a fault counts as an endless loop
SWITCH = """
namespace uz { inline int fault = 0; }
extern "C" __attribute__((visibility("default"), used)) inline void simt_set_fault(int number) { uz::fault = number; }
"""


def run(emulated: simt_run.Emulated, mode: str, cases: dict[str, simt_run.Cases], dtype: torch.dtype) -> str:
    """Return the first failure of one build, with the fault that is on."""
    for spec in emulated.specs:
        shared = cases[spec.name]
        rows = []
        for order in simt_run.ORDERS if mode == "plain" else simt_run.ORDERS[:1]:
            emulated.configure(order)
            if mode == "plain" and order == "ascending":
                rows.append(simt_run.parity(spec, dtype, order, shared, opcheck=False))
            else:
                rows.append(simt_run.each_sample(spec, dtype, order, shared, simt_run.complaints, first_failure=True))
            if rows[-1].failures:
                return f"{order}: {rows[-1].op}: {rows[-1].failures[0]}"
    return ""


def worker(folder: str, mode: str, define: str, library: Path, numbers: list[int]) -> None:
    """Run some faults of an op (0: none), each in a fork, and print a line for each."""
    emulated = simt_run.Emulated(folder, library, simt_build.prefix(define))
    dtype = torch.bfloat16 if define else torch.float32
    emulated.replace_real_kernels()
    cases = {spec.name: simt_run.cases_of(spec, dtype) for spec in emulated.specs}
    for shared in cases.values():
        assert shared.cases  # computed once, before the forks
    limit = 3600
    for number in numbers:
        sys.stdout.flush()
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                emulated.set_fault(number)
                failure = run(emulated, mode, cases, dtype)
                print(f"failure: {failure}" if failure else "passed", flush=True)
                os._exit(FAILED if failure else 0)
            _, status, used = os.wait4(child, 0)
            output.seek(0)
            text = output.read()
        seconds = used.ru_utime + used.ru_stime
        if number == 0:
            limit = 10 + math.ceil(PATIENCE * seconds)
        print(f"{number}\t{_outcome(os.waitstatus_to_exitcode(status), text)}\t{seconds:.1f}", flush=True)


def _outcome(status: int, text: str) -> str:
    if status == 0:
        return ""
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "does not end"
    for pattern in (r"failure: (.*)", r"ERROR: (AddressSanitizer: [\w-]+)", r"runtime error: .*"):
        if found := re.search(pattern, text):
            place = re.search(r"csrc/\S+?:\d+", text) if "AddressSanitizer" in found[0] else None
            return " ".join(found[found.lastindex or 0].split()) + (f" at {place[0]}" if place else "")
    return f"ended with status {status}: {' '.join(text.split()[-12:])}"


def outcomes(folder: str, mode: str, csrc: Path, numbers: list[int], define: str) -> dict[int, str]:
    """Run faults of one op in one mode; return what has failed, "" where nothing has."""
    library = simt_build.compile_op(folder, mode, csrc, define)
    preload = simt_build.runtime_library(mode)
    if preload is None and simt_build.MODES[mode].preload:
        sys.exit(f"{simt_build.MODES[mode].preload}: not beside {simt_build.compiler()}")
    with tempfile.TemporaryDirectory() as scratch:
        log = f"{scratch}/log"
        variables = {"OMP_NUM_THREADS": "1", "SIMT_LOG": log}
        variables |= simt_build.environment(mode, log if mode == "thread" else "")
        if preload:
            variables["LD_PRELOAD"] = str(preload)
        command = [sys.executable, __file__, "--worker", folder, mode, define, str(library), *map(str, numbers)]
        result = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
    lines = [line.split("\t") for line in result.stdout.splitlines() if line.count("\t") == 2]
    found = {int(number): failure for number, failure, _ in lines}
    if missing := set(numbers) - set(found):
        sys.exit(f"{folder}, {mode}: no outcome of {sorted(missing)}; status {result.returncode}\n{result.stdout}")
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        folder, mode, define, library, *numbers = sys.argv[2:]
        return worker(folder, mode, define, Path(library), [int(number) for number in numbers])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="folders of csrc; all by default")
    wanted = parser.parse_args().ops or list(dict.fromkeys(fault.op for fault in FAULTS))
    caught = dict[int, tuple[str, str]]()
    chosen = [i for i, fault in enumerate(FAULTS, start=1) if fault.op in wanted]
    false_alarms = []
    with tempfile.TemporaryDirectory(prefix="simt-") as scratch:
        csrc = Path(scratch) / "csrc"
        planting.plant(FAULTS, csrc, SWITCH)
        for folder in wanted:
            for define, mode in itertools.product(("", "UZ_SIMT_MMA"), simt_build.MODES):
                planted = [i for i in chosen if FAULTS[i - 1].op == folder]
                left = [i for i in planted if (FAULTS[i - 1] in MMA_FAULTS) == bool(define) and i not in caught]
                if not left and define:
                    continue
                for number, failure in outcomes(folder, mode, csrc, [0, *left], define).items():
                    if failure and number == 0:
                        false_alarms.append(f"{folder}, {mode} {define}: {failure}")
                    elif failure:
                        caught[number] = (mode, failure)
            for i in (i for i in chosen if FAULTS[i - 1].op == folder):
                mode, failure = caught.get(i, ("NOT", ""))
                print(f"{i:>2} {FAULTS[i - 1].file:<28} {FAULTS[i - 1].name:<52} {mode:<8} {failure[:110]}", flush=True)
    for alarm in false_alarms:
        print(f"without a fault: {alarm}")
    by_mode = ", ".join(f"{mode} {sum(m == mode for m, _ in caught.values())}" for mode in simt_build.MODES)
    print(f"{len(caught)} of {len(chosen)} faults caught: {by_mode}")
    sys.exit(FAILED if false_alarms or len(caught) < LEAST * len(chosen) else 0)


if __name__ == "__main__":
    main()
