"""Runs that faults happen to, one that nothing happens to, and what must be equal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faults.process import Hook, Running, check, cli, fork

TIMED = {"seconds", "tokens_per_second", "data_wait_share", "memory_bytes"}
STEPS, EVERY = 24, 4
CONFIG = f"""
model:
  vocab_size: 300
  hidden_size: 32
  num_layers: 2
  num_heads: 2
  ffn_hidden_size: 64
  layer_pattern: [standard_attn]
  dropout: 0.1
training:
  max_length: 32
  batch_size: 4
  gradient_accumulation_steps: 2
  dataset_batch_size: 64
  max_steps: {STEPS}
  learning_rate: 1e-2
  eval_every_n_steps: 8
  checkpoint_every_n_steps: {EVERY}
  log_every_n_steps: 1
  nan_check_interval: 1
  validation_fraction: 0.1
  device: cpu
  num_threads: 1
"""
WORDS = [
    "the",
    "king",
    "of",
    "the",
    "sea",
    "and",
    "the",
    "queen",
    "of",
    "the",
    "land",
    "saw",
    "el",
    "rey",
    "del",
    "mar",
    "y",
    "la",
    "reina",
    "de",
    "la",
    "tierra",
]


def sets(**training: Any) -> list[str]:
    """``--set`` options for fields of the training section."""
    return [word for name, value in training.items() for word in ("--set", f"training.{name}={json.dumps(value)}")]


class Bench:
    """A folder with data, a config, an unbroken run of it and one that was killed after step 14.

    Args:
        root: Where; made by ``prepare``, shared by all faults.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.straight, self.broken = root / "straight", root / "broken"
        self.config = root / "tiny.yaml"

    def prepare(self) -> None:
        """Write data and config, and make both runs."""
        self.root.mkdir(parents=True)
        fork(self.root, lambda: write_texts(self.root / "data/texts.parquet", texts(400))).wait().expect(0)
        paths = f"  local_parquet_dir: {self.root / 'data'}\n  cache_dir: {self.root / 'cache'}\n"
        self.config.write_text(CONFIG + paths)
        self.train(self.root, "straight").wait().expect(0)
        self.train(self.root, "broken", hook=dies_before(14)).wait().expect(-signal.SIGKILL)

    def train(self, folder: Path, run: str | Path = "run", *options: str | Path, hook: Hook | None = None) -> Running:
        """Start the config's run in ``folder / run``."""
        return cli(folder, "train", self.config, "--output-dir", folder / run, *options, hook=hook)

    def resume(self, folder: Path, run: str | Path = "run", *options: str | Path, hook: Hook | None = None) -> Running:
        """Go on with it."""
        return self.train(folder, run, "--resume", "auto", *options, hook=hook)

    def copy_of_broken(self, folder: Path) -> Path:
        """A copy of the run that was killed, for one fault."""
        return Path(shutil.copytree(self.broken, folder / "run"))

    def expect_straight(self, run: Path) -> None:
        """Fail unless a run ended as the unbroken one did, to the bit."""
        expect_equal(self.straight, run)


def texts(count: int, first: int = 0) -> list[str]:
    """Rows of a few words, each with its number."""
    return [
        f"n{row} " + " ".join(WORDS[(row * step) % len(WORDS)] for step in range(1, 6 + row % 17))
        for row in range(first, first + count)
    ]


def write_texts(path: Path, rows: Any, group: int = 50, **options: Any) -> None:
    """Write a Parquet file with page checksums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.table({"text": rows})
    pq.write_table(table, path, row_group_size=group, **{"write_page_checksum": True, **options})


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-??????"))


def leftovers(run: Path) -> list[str]:
    """Names of what a process left half written or half removed."""
    places = [path for place in (run, run / "checkpoints") if place.is_dir() for path in place.iterdir()]
    return [path.name for path in places if path.name.startswith(".") and path.name != ".lock"]


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what no two runs share; a line that is cut short does not count."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []:
        try:
            found.append({key: value for key, value in json.loads(line).items() if key not in TIMED})
        except ValueError:
            continue
    return found


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl."""
    return max((record["step"] for record in records(run)), default=0)


def expect_equal(first: Path, second: Path) -> None:
    """Fail unless two runs have the same last checkpoint and the same records, to the bit."""
    ends = [checkpoints(run)[-1] for run in (first, second)]
    check(ends[0].name == ends[1].name, f"ended at {ends[0].name} and {ends[1].name}")
    for name in ("model.safetensors", "optimizer.safetensors"):
        check((ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), f"{name} differs after the fault")
    states = [json.loads((end / "state.json").read_text()) for end in ends]
    for name in ("rng", "data", "window", "scaler", "validation_loss", "epoch"):
        check(states[0][name] == states[1][name], f"state.json: {name} differs after the fault")
    check(records(first) == records(second), "metrics.jsonl differs after the fault")
    check(not leftovers(second), f"left behind: {leftovers(second)}")


def expect_whole(run: Path) -> list[Path]:
    """Fail unless every checkpoint of a run has the files of its manifest; return them."""
    from ultrazoo.train.checkpoint import verify_checkpoint

    for path in checkpoints(run):
        verify_checkpoint(path)
    return checkpoints(run)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder but the lock and the output of processes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def dies_before(step: int) -> Hook:
    """The process kills itself before it takes the step after ``step``."""

    def plant() -> None:
        from ultrazoo.train.loop import Trainer

        take = Trainer.step

        def die(self: Any) -> None:
            if self.progress.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            take(self)

        Trainer.step = die  # type: ignore[method-assign]

    return plant


def slow_disk(seconds: float) -> Hook:
    """Every flush to the disk takes so much longer."""

    def plant() -> None:
        flush = os.fsync

        def slow(handle: int) -> None:
            time.sleep(seconds)
            flush(handle)

        os.fsync = slow

    return plant
