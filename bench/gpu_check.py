"""Holds the CUDA kernels to their references on this machine's GPU, times them, and writes what came out.

``python bench/gpu_check.py`` (``make gpu-check``) runs `ultrazoo parity ops --device cuda` and, if that passes,
`ultrazoo bench` on every op, forward and with gradients, in fp32 and bf16. It writes bench/results/gpu-NAME.json and
.md, NAME being the device's. Exit status: 1 without a GPU or without kernels for it, 3 when parity fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ultrazoo.ops import kernel_status
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec
from ultrazoo.testing.model_parity import with_kernels

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = ("float32", "bfloat16")
FAILED, PARITY_FAILED = 1, 3
HEADERS = ("sample", "dtype", "direction", "backend", "ms", "±", "times kernel", "GFLOP/s", "GB/s", "of copy", "MiB")


def main() -> int:
    """Check, time, write; return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="such as retention; all of them by default")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; cpu tries this script out")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="to time; may be repeated")
    parser.add_argument("--seconds", default="1", help="measuring time for each sample")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two files")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        print(f"gpu_check: no {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
        return FAILED
    specs = [spec for spec in registry().ops().values() if not asked.ops or spec.name.partition("::")[2] in asked.ops]
    if not asked.ops:
        specs = [spec for spec in specs if with_kernels([spec.name], device)]
    for status in (kernel_status(spec.name, device.type) for spec in specs):
        if not status.compiled:
            print(f"gpu_check: {status.op} has no kernel for {device}: {status.detail}; {status.fix}")
            return FAILED
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "doctor": _ultrazoo("doctor", "--json"), "parity": [], "bench": []}
    for spec in specs:
        report["parity"] += _ultrazoo("parity", spec.name, "--device", str(device), "--json")["checks"]
    failed = [check for check in report["parity"] if not check["ok"]]
    if not failed:
        report["bench"] = list(_bench(specs, device, asked.dtype or DTYPES, asked.seconds))
    path = asked.output / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(_page(report))
    print(f"gpu_check: {len(report['parity']) - len(failed)} of {len(report['parity'])} checks pass on {name}")
    print(f"gpu_check: wrote {path}.json and .md")
    return PARITY_FAILED if failed else 0


def _ultrazoo(*arguments: str) -> Any:
    """Run a command of ultrazoo that prints JSON, with its log on this one's stderr; 3 says that parity failed."""
    print("gpu_check: ultrazoo", *arguments, file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "ultrazoo", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, PARITY_FAILED) or not done.stdout:
        raise SystemExit(f"gpu_check: ultrazoo {' '.join(arguments)} failed with status {done.returncode}")
    return json.loads(done.stdout)


def _bench(specs: Iterable[OpSpec], device: torch.device, dtypes: Iterable[str], seconds: str) -> Iterable[Any]:
    for spec in specs:
        for dtype in dtypes:
            for direction in ([], ["--backward"]) if spec.differentiable else ([],):
                where = ("--device", str(device), "--dtype", dtype, "--seconds", seconds, *direction)
                yield from _ultrazoo("bench", spec.name, *where, "--json")["rows"]


def _page(report: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    checks, rows, facts = report["parity"], report["bench"], report["doctor"]
    failed = [check for check in checks if not check["ok"]]
    lines = [f"# {report['device']}", "", "Made by `make gpu-check`.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items() if key != "ops"]
    lines += ["", f"Parity: {len(checks) - len(failed)} of {len(checks)} checks pass, in every dtype of every op.", ""]
    lines += [f"- FAILED {c['subject']} {c['dtype']} {c['backend']}: {c['check']}: {c['detail']}" for c in failed]
    for op in dict.fromkeys(row["name"] for row in rows):
        lines += [f"\n## {op}\n", f"| {' | '.join(HEADERS)} |", "|" + "---|" * len(HEADERS)]
        kernel = {_task(row): row["median_s"] for row in rows if row["backend"] == "compiled"}
        lines += [f"| {' | '.join(_cells(row, kernel.get(_task(row))))} |" for row in rows if row["name"] == op]
    return "\n".join(lines) + "\n"


def _task(row: dict[str, Any]) -> tuple[str, ...]:
    return row["name"], row["sample"], row["dtype"], row["direction"]


def _cells(row: dict[str, Any], kernel: float | None) -> list[str]:
    spread = (row["q3_s"] - row["q1_s"]) / 2 / row["median_s"]
    figures = [f"{1e3 * row['median_s']:.4g}", f"{spread:.0%}", f"{row['median_s'] / kernel:.2f}" if kernel else ""]
    figures += ["" if row[key] is None else f"{row[key]:.0f}" for key in ("gflops", "gbytes", "copy_percent")]
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    return [row["sample"], row["dtype"], row["direction"], row["backend"], *figures, peak]


if __name__ == "__main__":
    sys.exit(main())
