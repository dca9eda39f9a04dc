"""Faults of a job of many processes, brought about for real: ``python tests/distributed_faults.py [--teardowns 20]``.

Prints a table; exit code 1 if a job was left hanging, lost its checkpoints, or ended well where it must not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CONFIG = {
    "model": {
        "vocab_size": 8192, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 64, "dropout": 0.0,
    },
    "training": {
        "batch_size": 6, "max_length": 32, "device": "cpu", "num_threads": 1, "kernels": "reference",
        "max_samples": 600, "dataset_batch_size": 128, "eval_max_batches": 2, "log_every_n_steps": 1,
        "checkpoint_every_n_steps": 20, "eval_every_n_steps": 100000, "max_steps": 100000, "lr_schedule": "constant",
    },
}  # fmt: skip
STEPS = re.compile(r"step-(\d+)")
LIMIT = 150.0


class Job:
    """``torchrun -m ultrazoo train`` in the background.

    Args:
        folder: Run folder.
        options: Training fields.
        arguments: Further arguments of the command.
        processes: How many train.
        nodes: How many torchruns start them, each as if on a machine of its own; they meet on a port.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        arguments: Sequence[str] = (),
        *,
        processes: int = 2,
        nodes: int = 1,
    ) -> None:
        config = folder.with_suffix(".yaml")
        config.write_text(json.dumps(CONFIG))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes // nodes)]
        if nodes > 1:
            command += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id", folder.name]
            command += ["--rdzv-endpoint", f"localhost:{free_port()}"]
        command += ["-m", "ultrazoo", "train", str(config), "--output-dir", str(folder), *arguments]
        command += [part for option in options for part in ("--set", f"training.{option}")]
        self.folder, self.log = folder, folder.with_suffix(".log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.launchers = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for _ in range(nodes)]

    def workers(self) -> list[int]:
        """Process numbers, by rank where there is one torchrun."""
        parents = ",".join(str(launcher.pid) for launcher in self.launchers)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", parents], capture_output=True, text=True)
        return sorted(map(int, listed.stdout.split()))

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        found = (self.folder / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(match[1]) for path in found if (match := STEPS.fullmatch(path.parent.name)))

    def wait_for_checkpoint(self) -> None:
        """Wait until there is a checkpoint, and a little more."""
        begun = time.monotonic()
        while not self.steps():
            if any(launcher.poll() is not None for launcher in self.launchers) or time.monotonic() - begun > LIMIT:
                raise RuntimeError(f"no checkpoint:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        time.sleep(0.5)

    def end(self) -> tuple[int, float]:
        """Wait for the job; return its greatest exit code and the seconds that it took from now."""
        begun = time.monotonic()
        try:
            codes = [launcher.wait(LIMIT) for launcher in self.launchers]
        except subprocess.TimeoutExpired:
            for pid in [*self.workers(), *(launcher.pid for launcher in self.launchers)]:
                os.kill(pid, signal.SIGKILL)
            return -1, LIMIT
        return max(codes), time.monotonic() - begun


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def struck(
    folder: Path, whom: str, number: signal.Signals, options: Sequence[str] = (), nodes: int = 1
) -> tuple[bool, str]:
    """Send a signal into a running job, then resume it for a few steps; return whether all went well, and what went."""
    job = Job(folder, options, nodes=nodes)
    job.wait_for_checkpoint()
    workers, before = job.workers(), job.steps()
    os.kill(job.launchers[0].pid if whom == "torchrun" else workers[int(whom[-1])], number)
    code, seconds = job.end()
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    steps = job.steps()
    asks = number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    saved = steps[-1] > before[-1] if asks else steps[-1] >= before[-1]
    goal = steps[-1] + 3
    again = Job(folder, [*options, f"max_steps={goal}"], ["--resume", "auto"], nodes=nodes)
    resumed, _ = again.end()
    went_on = resumed == 0 and again.steps()[-1] == goal
    text = f"exit code {code} after {seconds:.1f} s, checkpoint of step {steps[-1]}, "
    text += f"{'resumed' if went_on else 'NOT resumed'}{', processes left' if left else ''}"
    return code > 0 and not left and saved and went_on, text


def same_losses(folder: Path) -> tuple[bool, str]:
    """Train four steps of six rows by one process and by four, of which two get two rows and two get one."""
    losses = {}
    for name, options, processes, nodes in [
        ("one", [], 1, 1),
        ("four, ddp", ["distributed=ddp"], 4, 1),
        ("four, fsdp", ["distributed=fsdp"], 4, 1),
        ("four of two torchruns", ["distributed=ddp"], 4, 2),
    ]:
        job = Job(folder / name.replace(" ", "-"), [*options, "max_steps=4"], processes=processes, nodes=nodes)
        code, _ = job.end()
        if code:
            print(job.log.read_text()[-4000:], file=sys.stderr, flush=True)
            return False, f"{name}: exit code {code}"
        records = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record[key] for record in records for key in ("loss", "validation_loss") if key in record]
    one = losses.pop("one")
    apart = {name: max(abs(a / b - 1) for a, b in zip(of_four, one, strict=True)) for name, of_four in losses.items()}
    text = "; ".join(f"{name}: at most {share:.1e}" for name, share in apart.items())
    return max(apart.values()) < 1e-5, f"relative difference from one process, {len(one)} losses: {text}"


def teardowns(folder: Path, count: int) -> tuple[bool, str]:
    """Run short jobs to their end, one after the other, DDP and FSDP in turn."""
    codes = []
    for number in range(count):
        kind = ("ddp", "fsdp")[number % 2]
        job = Job(folder / f"{number}", [f"distributed={kind}", "max_steps=3"])
        codes.append(job.end()[0])
        if codes[-1]:
            print(job.log.read_text()[-4000:], file=sys.stderr, flush=True)
    return codes == [0] * count, f"{codes.count(0)} of {count} ended with exit code 0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teardowns", type=int, default=20, help="short jobs that must end well")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    arguments = parser.parse_args()
    failed = 0
    print("| fault | what came of it |\n|---|---|")
    with tempfile.TemporaryDirectory(prefix="ultrazoo-distributed-") as scratch:
        root = Path(scratch)
        (root / "ends").mkdir()
        (root / "four").mkdir()
        trials = {
            "SIGTERM to torchrun": lambda: struck(root / "a", "torchrun", signal.SIGTERM),
            "SIGINT to torchrun": lambda: struck(root / "b", "torchrun", signal.SIGINT),
            "SIGTERM to rank 1": lambda: struck(root / "c", "rank 1", signal.SIGTERM),
            "SIGHUP to torchrun": lambda: struck(root / "j", "torchrun", signal.SIGHUP),
            "SIGHUP to rank 1": lambda: struck(root / "k", "rank 1", signal.SIGHUP),
            "SIGKILL to rank 1": lambda: struck(root / "d", "rank 1", signal.SIGKILL),
            "SIGKILL to rank 0": lambda: struck(root / "e", "rank 0", signal.SIGKILL),
            "SIGKILL to rank 1, fsdp": lambda: struck(root / "f", "rank 1", signal.SIGKILL, ["distributed=fsdp"]),
            "rank 1 stands still (SIGSTOP), distributed_timeout 10": lambda: struck(
                root / "g", "rank 1", signal.SIGSTOP, ["distributed_timeout=10"]
            ),
            "SIGKILL to a process of one of two torchruns": lambda: struck(
                root / "h", "rank 1", signal.SIGKILL, nodes=2
            ),
            "SIGTERM to one of two torchruns": lambda: struck(root / "i", "torchrun", signal.SIGTERM, nodes=2),
            "four processes instead of one": lambda: same_losses(root / "four"),
            f"end of {arguments.teardowns} jobs": lambda: teardowns(root / "ends", arguments.teardowns),
        }
        for name, trial in trials.items():
            if arguments.only not in name:
                continue
            well, text = trial()
            failed += not well
            print(f"| {name} | {text}{'' if well else ' **FAILED**'} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
