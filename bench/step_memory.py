"""Compare the memory that ``ultrazoo train PRESET --dry-run`` expects with that of real runs of the preset.

    OMP_NUM_THREADS=1 python bench/step_memory.py [--runs 3] [--steps 3] [tinybert embbert ...]

A real run is ``train`` on the embedded corpus in a process of its own, validation and checkpoint included. Measured is
the peak of its resident memory minus that before the model is built; the table has the median of the runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile

from ultrazoo.bench.footprint import count_flops, measure_memory
from ultrazoo.config import load_config
from ultrazoo.model import build_model

RUN = """
import sys
from pathlib import Path
from ultrazoo.config import load_config
from ultrazoo.model import build_model
from ultrazoo.train import run
preset, folder, *sets = sys.argv[1:]
before = []

def build(config):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before.append(int(status["VmRSS"].split()[0]) * 1024)
    Path("/proc/self/clear_refs").write_text("5")
    return build_model(config)

run.build_model = build
run.train(load_config(preset, sets).config, run_dir=Path(folder) / "run")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024 - before[0])
"""


def real_peak(preset: str, sets: list[str]) -> int:
    """Train in a process of its own; return the growth of its resident memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, preset, folder, *sets]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print a row for each preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["tinybert", "embbert", "mini"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    sets = ["training.device=cpu", "training.num_threads=1"]
    limits = [f"training.max_steps={options.steps}", "training.eval_max_batches=1"]
    print("| preset | GFLOP per step | expected MiB | measured MiB | error | runs |\n|---|---|---|---|---|---|")
    for preset in options.presets:
        config = load_config(preset, sets).config
        flops, seconds = count_flops(build_model(config.model), config)
        memory = measure_memory(config, seconds)
        if memory is None:
            raise SystemExit("this system reports no peak memory; run it on Linux")
        peaks = [real_peak(preset, [*sets, *limits]) for _ in range(options.runs)]
        median = statistics.median(peaks)
        shown = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks)
        print(
            f"| {preset} ({memory.basis}) | {flops / 1e9:,.1f} | {memory.peak / 2**20:,.0f} | {median / 2**20:,.0f} | "
            f"{memory.peak / median - 1:+.1%} | {shown} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
