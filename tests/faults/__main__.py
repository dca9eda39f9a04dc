"""Bring every fault about, print what came of it, exit 1 if one was not survived.

cd tests && python -m faults [--quick] [--only 1a,5] [--jobs 2] [--json FILE]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

# what a run imports: once here instead of in every process
import torch
import torch._dynamo
import torch.distributed.tensor
import torch.onnx

import ultrazoo.cli
import ultrazoo.core
import ultrazoo.train.run
import ultrazoo.train.verify  # noqa: F401
from faults import folders, fuzz, kills, numbers, signalled, stored, streams, texts_read
from faults.parts import Bench
from faults.registry import DISTRIBUTED, FAULTS, Fault, Result, as_dict, bring

MODULES = (kills, stored, texts_read, signalled, streams, folders, numbers, fuzz)


def main() -> int:
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="faults", description="Every fault that a training run must survive.")
    parser.add_argument("--quick", action="store_true", help="what fits into a minute")
    parser.add_argument("--only", default="", help="numbers, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    arguments = parser.parse_args()
    if arguments.list:
        named = [(one.number, one.name) for one in FAULTS] + list(DISTRIBUTED.items())
        print("\n".join(f"{number} {name}" for number, name in sorted(named, key=lambda item: _order(item[0]))))
        return 0
    wanted = [number for number in arguments.only.split(",") if number]
    chosen = [one for one in FAULTS if one.number in wanted or (not wanted and _in_plan(one, arguments.quick))]
    if unknown := set(wanted) - {one.number for one in FAULTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(one.number for one in FAULTS)}")
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="ultrazoo-faults-"))
    root.chmod(0o755)
    begun = time.monotonic()
    try:
        bench = Bench(root / "bench")
        bench.prepare()
        print(f"bench ready after {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        results = _run(chosen, bench, root, arguments.jobs)
    finally:
        stored.mounts_left(root)
        shutil.rmtree(root, ignore_errors=True)
    if not wanted and not arguments.quick:
        results += [Result(number, name, "distributed: other script", "", "-") for number, name in DISTRIBUTED.items()]
    results.sort(key=lambda result: _order(result.number))
    print(table(results))
    seconds = time.monotonic() - begun
    failed = [result.number for result in results if result.verdict == "FAILED"]
    print(f"\n{len(results)} rows, {len(failed)} failed, {seconds:.0f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "faults": [as_dict(r) for r in results]}, indent=1))
    return 1 if failed else 0


def _order(number: str) -> tuple[int, str]:
    return int(re.findall(r"\d+", number)[0]), number


def _in_plan(one: Fault, quick: bool) -> bool:
    """Rows ending in q stand in for longer ones in the quick run."""
    return one.quick if quick else not one.number.endswith("q")


def _run(chosen: list[Fault], bench: Bench, root: Path, jobs: int) -> list[Result]:
    """Run each fault in a process of its own, ``jobs`` at a time, the long ones first."""
    waiting = sorted(chosen, key=lambda one: -one.limit)
    running: dict[int, tuple[Fault, Path, float]] = {}
    results: list[Result] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            one = waiting.pop(0)
            folder = root / f"fault-{one.number}"
            folder.mkdir()
            running[_start(one, bench, folder)] = (one, folder, time.monotonic())
        for pid, (one, folder, begun) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - begun < one.limit:
                continue
            if not done:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            path = folder / "result.json"
            if path.is_file():
                result = Result(**json.loads(path.read_text()))
            else:
                happened = f"ended by itself with status {status}" if done else f"longer than {one.limit:.0f} s"
                result = Result(one.number, one.name, happened, "?", "FAILED")
            results.append(result)
            times = f"{result.seconds:.0f} s, of the processor {result.cpu_seconds:.0f} s"
            print(f"{result.verdict:6} {one.number:>3} {one.name} ({times})", file=sys.stderr, flush=True)
            stored.mounts_left(folder)
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
    return results


def _start(one: Fault, bench: Bench, folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        result = bring(one, bench, folder)
        (folder / "half").write_text(json.dumps(as_dict(result)))
        (folder / "half").rename(folder / "result.json")
        code = 0
    finally:
        os._exit(code)


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    rows = ["| # | fault | what happened | what was lost | s | verdict |", "|---|---|---|---|---|---|"]
    for one in results:
        happened = " ".join(one.happened.split()).replace("|", "/")
        rows.append(f"| {one.number} | {one.name} | {happened} | {one.lost} | {one.seconds:.0f} | {one.verdict} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
